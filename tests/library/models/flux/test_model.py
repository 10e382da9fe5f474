from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from library.models.flux import rope
from library.models.flux.model import without_padding
from library.models.flux.rope import RopeTables
from tests.library.models.flux.small import CHROMA, DEV, SCHNELL, controlnet, inputs, transformer

MODELS = pytest.mark.parametrize("shape", [DEV, SCHNELL, CHROMA], ids=["dev", "schnell", "chroma"])


@MODELS
def test_short_captions_answer_as_if_their_padding_were_not_there(shape) -> None:
    model, given = transformer(shape), inputs(shape)
    whole = model(**given, lengths=(3, 5))
    for row, length in enumerate((3, 5)):
        alone = {name: value[row : row + 1] if isinstance(value, Tensor) else value for name, value in given.items()}
        alone["txt"] = alone["txt"][:, :length]
        torch.testing.assert_close(whole[row : row + 1], model(**alone), atol=2e-5, rtol=1e-4)


@MODELS
def test_what_stands_in_the_padding_does_not_matter(shape) -> None:
    model, given = transformer(shape), inputs(shape)
    first = model(**given, lengths=(3, 4))
    given["txt"][0, 3:] = 1000.0
    given["txt"][1, 4:] = -1000.0
    assert torch.equal(first, model(**given, lengths=(3, 4)))


def test_texts_are_cut_in_steps_and_rows_keep_their_counts() -> None:
    def cut(lengths: tuple[int, ...] | None) -> tuple[int, tuple[int, ...] | None]:
        txt, keys = without_padding(torch.zeros(2, 80, 4), lengths, 6)
        return txt.shape[1], None if keys is None else keys.counts

    assert cut(None) == (80, None) and cut((80, 80)) == (80, None)
    assert cut((3, 3)) == (32, (9, 9)) and cut((3, 33)) == (64, (9, 39))
    assert cut((32, 32)) == (32, None) and cut((70, 1)) == (80, (76, 7))


def test_the_table_of_angles_is_made_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = RopeTables._table
    monkeypatch.setattr(RopeTables, "_table", lambda self, size, text: made.append(size) or original(self, size, text))
    model = transformer(DEV)
    for size, tokens in (((2, 3), 5), ((3, 2), 5), ((2, 3), 4), ((2, 3), 5)):
        model(**inputs(DEV, size=size, tokens=tokens))
    assert made == [(2, 3), (3, 2)]
    model(**inputs(DEV, tokens=600))
    assert made == [(2, 3), (3, 2), (2, 3)], "a longer text than the table has room for"


def test_tables_of_pictures_serve_training_too_and_old_ones_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = transformer(DEV), inputs(DEV)
    with torch.inference_mode():
        model(**given)
    given["img"].requires_grad_()
    model(**given).sum().backward()
    assert given["img"].grad is not None
    monkeypatch.setattr(rope, "MOST_TABLES", 2)
    tables = RopeTables(32)
    for side in (1, 2, 3):
        tables((side, side), 1, torch.device("cpu"))
    assert [size[:2] for size in tables._tables] == [(2, 2), (3, 3)]


def test_heads_that_cannot_be_shared_among_three_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="heads of 40 channels"):
        RopeTables(40)


def test_a_gradient_reaches_the_picture_through_every_block() -> None:
    model, given = transformer(DEV), inputs(DEV)
    given["img"].requires_grad_()
    model(**given, lengths=(3, 5)).sum().backward()
    assert given["img"].grad is not None and given["img"].grad.abs().min() > 0


def test_single_residuals_lie_with_the_text_first() -> None:
    model, given = transformer(DEV), inputs(DEV, rows=1)
    residual = torch.zeros(1, 5 + 6, 64)
    residual[:, 5:] = 0.5  # the picture alone
    moved = model(**given, single_residuals=[residual])
    assert not torch.equal(moved, model(**given))
    residual = torch.zeros(1, 5 + 6, 64)
    residual[:, 3:5] = 0.5  # padding alone
    assert torch.equal(model(**given, lengths=(3,), single_residuals=[residual]), model(**given, lengths=(3,)))


def test_a_controlnet_gives_a_residual_for_each_of_its_blocks_and_the_picture_steers_them() -> None:
    net, given = controlnet(), inputs(DEV)
    control = torch.rand(2, 3, 32, 48) * 2 - 1
    first = net(given.pop("img"), control, *given.values())
    assert [residual.shape for residual in first] == [(2, 6, 64)] * 2
    assert not torch.equal(first[0], net(inputs(DEV)["img"], -control, *given.values())[0])


def test_compiled_blocks_are_the_same_programs_for_captions_of_all_lengths() -> None:
    model, given = transformer(DEV), inputs(DEV)
    given["img"].requires_grad_()
    lengths = (None, (3, 5), (4, 2), (5, 5), (3, 3))
    expected = [answer_and_gradient(model, given, row) for row in lengths]
    programs = CompileCounterWithBackend("aot_eager")
    for kind in (model.double_blocks, model.single_blocks):
        compiled = torch.compile(type(kind[0]).forward, backend=programs, dynamic=False)
        for block in kind:
            block.forward = partial(compiled, block)
    made = []
    for row, (answer, gradient) in zip(lengths, expected, strict=True):
        ours = answer_and_gradient(model, given, row)
        torch.testing.assert_close(ours[0], answer, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[1], gradient, atol=1e-5, rtol=1e-5)
        made.append(programs.frame_count)
    assert 0 < made[0] < made[1], "one set of programs for whole texts, one for counted ones"
    assert made[1:] == [made[1]] * 4


def answer_and_gradient(model: Any, given: dict[str, Any], lengths: Any) -> tuple[Tensor, Tensor]:
    answer = model(**given, lengths=lengths)
    (gradient,) = torch.autograd.grad(answer.square().sum(), given["img"])
    return answer.detach(), gradient


def test_a_block_keeps_its_number_format() -> None:
    model = transformer(DEV).to(torch.bfloat16)
    given = {name: v.to(torch.bfloat16) if isinstance(v, Tensor) else v for name, v in inputs(DEV).items()}
    plain = model(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(**given), plain, atol=0, rtol=0)
    assert plain.dtype == torch.bfloat16
