const data = JSON.parse(document.getElementById("data").textContent);
const index = document.getElementById("index"), slices = [...document.querySelectorAll(".slice")];
const layers = [...document.querySelectorAll(".layer")], opacities = [...document.querySelectorAll(".opacity")];
function show() {
  const i = Number(index.value), window_ = Number(document.querySelector("[name=window]:checked").value);
  const said = data.texts.map(of => of[i]);
  slices.forEach((slice, n) => {
    const shown = n ? data.there[i] : i;
    slice.hidden = shown === null;
    if (!slice.hidden) slice.src = data.scans[n][window_][shown];
    slice.alt = said[n] + "; " + data.names[window_];
  });
  document.getElementById("text").textContent = said.join("; ");
  index.setAttribute("aria-valuetext", said.join("; "));
  layers.forEach((layer, n) => {
    const picture = data.layers[n][i];
    layer.hidden = !picture;
    if (picture) layer.src = picture;
    layer.style.opacity = opacities[n].value;
  });
}
function step(by) { index.value = Number(index.value) + by; show(); }
document.getElementById("scans").addEventListener("wheel", event => {
  event.preventDefault();
  step(event.deltaY < 0 ? 1 : -1);
}, { passive: false });
const keys = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 };
document.addEventListener("keydown", event => {
  if (event.target.tagName === "INPUT" || !(event.key in keys)) return;
  event.preventDefault();
  step(keys[event.key]);
});
document.addEventListener("input", show);
show();
