"use strict";
// Videos of one page play together, so that columns can be compared frame by frame. Without scripts they simply loop.
const videos = [...document.querySelectorAll(".samples video")];
const play = document.getElementById("play");
if (play && videos.length) {
  let running = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const apply = () => {
    play.textContent = running ? "Pause" : "Play";
    for (const video of videos) {
      video.currentTime = 0;
      if (running) video.play().catch(() => {}); else video.pause();
    }
  };
  play.hidden = false;
  play.addEventListener("click", () => { running = !running; apply(); });
  Promise.race([
    Promise.all(videos.map(v => v.readyState > 1 ? 0 : new Promise(done => v.addEventListener("loadeddata", done, { once: true })))),
    new Promise(done => setTimeout(done, 4000)),
  ]).then(apply);
}
const zoom = document.getElementById("zoom");
for (const video of videos) {
  video.addEventListener("click", () => {
    const large = document.createElement("video");
    Object.assign(large, { src: video.src, loop: true, muted: true, controls: true, autoplay: true });
    if (video.closest(".small")) large.className = "small";
    const text = document.createElement("p");
    text.textContent = video.getAttribute("aria-label");
    zoom.replaceChildren(large, text);
    zoom.showModal();
  });
}
zoom.addEventListener("click", event => { if (event.target === zoom) zoom.close(); });
zoom.addEventListener("close", () => zoom.replaceChildren());

const SVG = "http://www.w3.org/2000/svg";
const tip = document.createElement("div");
tip.className = "tip";
for (const svg of document.querySelectorAll("svg.chart")) {
  const lines = JSON.parse(svg.dataset.points);
  const box = svg.viewBox.baseVal;
  const layer = svg.appendChild(document.createElementNS(SVG, "g"));
  const clear = () => { layer.replaceChildren(); tip.remove(); };
  svg.addEventListener("pointerleave", clear);
  svg.addEventListener("pointermove", event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const near = lines.map(line => line.at.reduce((best, point) => Math.abs(point[0] - at.x) < Math.abs(best[0] - at.x) ? point : best));
    const lead = near.reduce((best, point) => Math.abs(point[0] - at.x) < Math.abs(best[0] - at.x) ? point : best);
    clear();
    const hair = document.createElementNS(SVG, "line");
    for (const [name, value] of Object.entries({ class: "hair", x1: lead[0], x2: lead[0], y1: 10, y2: box.height - 24 })) hair.setAttribute(name, value);
    layer.append(hair);
    const rows = [];
    near.forEach((point, index) => {
      if (Math.abs(point[0] - lead[0]) > 12) return;
      const mark = document.createElementNS(SVG, "circle");
      for (const [name, value] of Object.entries({ class: `mark s${lines[index].colour}`, cx: point[0], cy: point[1], r: 3.5 })) mark.setAttribute(name, value);
      layer.append(mark);
      rows.push(`${lines[index].label} ${point[3]}`);
    });
    tip.replaceChildren(...[`step ${lead[2]}`, ...rows].map(text => { const row = document.createElement("div"); row.textContent = text; return row; }));
    document.body.append(tip);
    const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
    tip.style.left = `${right ? event.clientX - tip.offsetWidth - 12 : event.clientX + 16}px`;
    tip.style.top = `${event.clientY + 14}px`;
  });
}
