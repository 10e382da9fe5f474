"""How the report page looks, in light and dark, and how its curves answer the pointer."""

STYLE = """
:root{--back:#f6f7f9;--card:#fff;--text:#1c2430;--soft:#5d6b7e;--rule:#dde2e9;--bar:#5b8def;
--c0:#3b76e0;--c1:#d8572a;--c2:#2a9d6f;--c3:#8e5bd0;--c4:#b8860b;--c5:#c2417c}
@media(prefers-color-scheme:dark){
:root{--back:#14181e;--card:#1d232b;--text:#e4e9f0;--soft:#94a3b8;--rule:#333d4a;--bar:#4d7fd6;
--c0:#6ea0ff;--c1:#ff8a5c;--c2:#4fd1a0;--c3:#b794f6;--c4:#e0b341;--c5:#f27db0}
}
*{box-sizing:border-box}
body{margin:0 auto;padding:20px;max-width:1500px;background:var(--back);color:var(--text);
font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:22px;margin:0 0 10px;overflow-wrap:anywhere}
h2{font-size:15px;margin:0 0 8px}
h3{font-size:13px;margin:10px 0 2px}
section{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px;
margin:0 0 14px;min-width:0}
.ending{font-size:17px;margin:0 0 8px;overflow-wrap:anywhere}
.ending.failure{color:var(--c1);font-weight:600}
progress{width:100%;height:10px;accent-color:var(--c0)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));gap:14px;margin-bottom:14px}
.cards section{margin:0}
.cells{display:flex;flex-wrap:wrap;gap:8px 28px;margin:8px 0}
.cells dt{color:var(--soft);font-size:12px}
.cells dd{margin:0;font-size:17px;font-variant-numeric:tabular-nums}
.note{color:var(--soft);font-size:12px;margin:4px 0 10px}
svg{display:block;width:100%;height:auto}
.grid{stroke:var(--rule)}
.tick{fill:var(--soft);font-size:11px}
.end{text-anchor:end}
.middle{text-anchor:middle}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.line.faint{stroke-width:1;opacity:.45}
.band{stroke:none;opacity:.14}
.bar{fill:var(--bar)}
.cursor{stroke:var(--soft);stroke-dasharray:3 3;visibility:hidden}
.line.c0{stroke:var(--c0)}
.line.c1{stroke:var(--c1)}
.line.c2{stroke:var(--c2)}
.line.c3{stroke:var(--c3)}
.line.c4{stroke:var(--c4)}
.line.c5{stroke:var(--c5)}
.band.c0,.dot.c0{fill:var(--c0)}
.band.c1,.dot.c1{fill:var(--c1)}
.band.c2,.dot.c2{fill:var(--c2)}
.band.c3,.dot.c3{fill:var(--c3)}
.band.c4,.dot.c4{fill:var(--c4)}
.band.c5,.dot.c5{fill:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:4px 0 0;font-size:12px;color:var(--soft);min-height:18px}
.legend span::before{content:"";display:inline-block;width:14px;height:3px;margin-right:5px;
vertical-align:middle;background:currentColor}
.legend .c0::before{background:var(--c0)}
.legend .c1::before{background:var(--c1)}
.legend .c2::before{background:var(--c2)}
.legend .c3::before{background:var(--c3)}
.legend .c4::before{background:var(--c4)}
.legend .c5::before{background:var(--c5)}
.legend b{font-weight:400;color:var(--text);margin-left:auto;font-variant-numeric:tabular-nums}
.prompt{margin:8px 0 4px}
.strip{display:flex;gap:8px;overflow-x:auto;padding-bottom:6px}
figure{margin:0;flex:none}
figure img{display:block;max-width:224px;border-radius:4px}
figcaption{font-size:12px;color:var(--soft)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:2px 14px 2px 0;vertical-align:top;overflow-wrap:anywhere}
th{color:var(--soft);font-weight:500}
td:first-child,.number{white-space:nowrap}
th{white-space:nowrap}
.marked td{font-weight:650}
.columns{columns:3 380px;column-gap:28px}
.columns>div{break-inside:avoid}
ul{margin:0;padding-left:18px}
li{white-space:pre-wrap;overflow-wrap:anywhere}
"""

SCRIPT = """
for(const chart of document.querySelectorAll("[data-chart]")){
const {x,lines}=JSON.parse(chart.dataset.chart),svg=chart.querySelector("svg"),
cursor=chart.querySelector(".cursor"),out=chart.querySelector("b");
svg.addEventListener("pointermove",event=>{
const box=svg.getBoundingClientRect(),share=(event.clientX-box.left)/box.width,
step=x[0]+(share-x[2])/(x[3]-x[2])*(x[1]-x[0]);
if(step<x[0]||step>x[1])return;
const near=points=>points.reduce((a,b)=>Math.abs(b[0]-step)<Math.abs(a[0]-step)?b:a);
const place=share*svg.viewBox.baseVal.width;
cursor.setAttribute("x1",place);cursor.setAttribute("x2",place);cursor.style.visibility="visible";
out.textContent="step "+near(lines[0][1])[0]+": "+lines.map(line=>line[0]+" "+near(line[1])[1]).join(", ");});
svg.addEventListener("pointerleave",()=>{cursor.style.visibility="hidden";out.textContent="";});}
for(const note of document.querySelectorAll("[data-written]")){
const minutes=Math.floor((Date.now()/1000-note.dataset.written)/60);
if(minutes>=15){note.className="ending failure";
note.textContent="nothing new for "+(minutes<120?minutes+" minutes":Math.floor(minutes/60)+" hours")+
": the run was killed, or a step takes that long ("+note.textContent+")";}}
"""
