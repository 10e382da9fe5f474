"""The rules that hold for the settings of every script; a family brings those about its own flags."""

from library.flags.rules.deepspeed import DEEPSPEED
from library.flags.rules.images import IMAGES
from library.flags.rules.memory import MEMORY
from library.flags.rules.needed import NEEDED
from library.flags.rules.results import RESULTS
from library.flags.rules.rule import Rules
from library.flags.rules.sharding import SHARDING
from library.flags.rules.training import TRAINING

EVERY_RUN: Rules = NEEDED + IMAGES + TRAINING + MEMORY + DEEPSPEED + SHARDING + RESULTS
