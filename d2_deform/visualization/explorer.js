"use strict";
// The explorer's page, see explorer.py. Locations and points are [x, y] in pixels of the picture; what
// is on feature maps is [y, x], in cells, as in sampling.py, whose SamplingRecord.trace this repeats.

/** The offsets of a layer, (groups, taps, 2, Ho, Wo), still quantised; decoded once. */
function offsetsOf(layer) {
  if (!layer.decoded) {
    const text = atob(layer.offsets);
    const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
    layer.decoded = layer.bytes === 2 ? new Int16Array(bytes.buffer) : new Int8Array(bytes.buffer);
  }
  return layer.decoded;
}

/** Displacements [y, x] of all taps at a fractional cell: bilinear, beyond the border as at it. */
function readOffsets(layer, group, [y, x]) {
  const offsets = offsetsOf(layer);
  const [height, width] = layer.outputSize;
  const taps = layer.kernel[0] * layer.kernel[1];
  const row = Math.min(Math.max(y, 0), height - 1);
  const column = Math.min(Math.max(x, 0), width - 1);
  const [top, left] = [Math.floor(row), Math.floor(column)];
  const [below, right] = [Math.min(top + 1, height - 1), Math.min(left + 1, width - 1)];
  const [down, across] = [row - top, column - left];
  const plane = height * width;
  const read = (channel) => {
    const at = (group * taps * 2 + channel) * plane;
    const upper = offsets[at + top * width + left] * (1 - across) + offsets[at + top * width + right] * across;
    const lower = offsets[at + below * width + left] * (1 - across) + offsets[at + below * width + right] * across;
    return (upper * (1 - down) + lower * down) * layer.scale;
  };
  return Array.from({ length: taps }, (_, tap) => [read(2 * tap), read(2 * tap + 1)]);
}

/** The input cells that a layer's filter samples to compute an output cell. */
function sampleFrom(layer, group, position, deformed) {
  const offsets = deformed ? readOffsets(layer, group, position) : null;
  const samples = [];
  for (let i = 0; i < layer.kernel[0]; i++) {
    for (let j = 0; j < layer.kernel[1]; j++) {
      const [dy, dx] = offsets ? offsets[samples.length] : [0, 0];
      samples.push([
        position[0] * layer.stride[0] - layer.padding[0] + i * layer.dilation[0] + dy,
        position[1] * layer.stride[1] - layer.padding[1] + j * layer.dilation[1] + dx,
      ]);
    }
  }
  return samples;
}

/** The cell [y, x] of a layer's output at a location. */
function cellAt(picture, layer, [x, y]) {
  return [
    (y * picture.ratio[1]) / layer.outputStride[0] - 0.5,
    (x * picture.ratio[0]) / layer.outputStride[1] - 0.5,
  ];
}

/** Sampling points of one location through some layers that lie one behind the other. */
function trace(picture, layers, location, group, deformed) {
  let positions = [cellAt(picture, layers[layers.length - 1], location)];
  for (let index = layers.length - 1; index >= 0; index--) {
    const layer = layers[index];
    if (index < layers.length - 1) {
      positions = positions.map(([y, x]) => [y * layer.step[0], x * layer.step[1]]);
    }
    positions = positions.flatMap((position) => sampleFrom(layer, group, position, deformed));
  }
  return positions.map(([y, x]) => [
    ((x + 0.5) * layers[0].inputStride[1]) / picture.ratio[0],
    ((y + 0.5) * layers[0].inputStride[0]) / picture.ratio[1],
  ]);
}

/** Mean distance of taps that are neighbours in a row or a column, in cells of the layer's input. */
function effectiveDilation(picture, layer, location, group) {
  const taps = sampleFrom(layer, group, cellAt(picture, layer, location), true);
  const [rows, columns] = layer.kernel;
  const distances = [];
  const add = (a, b) => distances.push(Math.hypot(taps[a][0] - taps[b][0], taps[a][1] - taps[b][1]));
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      if (i + 1 < rows) add(i * columns + j, (i + 1) * columns + j);
      if (j + 1 < columns) add(i * columns + j, i * columns + j + 1);
    }
  }
  return distances.reduce((sum, one) => sum + one, 0) / distances.length;
}

/** The convex hull of points, by Andrew's monotone chain. */
function convexHull(points) {
  const sorted = [...points].sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const turn = (a, b, c) => (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]);
  const half = (ordered) => {
    const chain = [];
    for (const point of ordered) {
      while (chain.length > 1 && turn(chain[chain.length - 2], chain[chain.length - 1], point) <= 0) chain.pop();
      chain.push(point);
    }
    return chain.slice(0, -1);
  };
  return [...half(sorted), ...half(sorted.reverse())];
}

/** Width and height of what points cover. */
function extent(points) {
  return [0, 1].map((axis) => {
    const values = points.map((point) => point[axis]);
    return Math.max(...values) - Math.min(...values);
  });
}

function startExplorer() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const state = { picture: 0, location: [0, 0], follow: "all", group: 0, detection: "none" };
  const drawn = { plain: [], deformable: [] };
  const images = data.pictures.map((one) => Object.assign(new Image(), { src: one.image }));
  const picture = () => data.pictures[state.picture];
  const followed = () => (state.follow in picture().layers ? [picture().layers[state.follow]] : picture().layers);

  function addOptions(select, texts) {
    select.replaceChildren(...Object.entries(texts).map(([value, text]) => new Option(text, value)));
  }

  function choosePicture(index) {
    state.picture = index;
    Object.assign(state, { follow: "all", group: 0, detection: "none" });
    const { layers, detections, width, height, start } = picture();
    element("x").max = width;
    element("y").max = height;

    element("layers").hidden = layers.length === 0;
    element("table-box").hidden = layers.length === 0;
    element("layers").querySelectorAll("label").forEach((label) => label.remove());
    const points = layers.reduce((number, layer) => number * layer.kernel[0] * layer.kernel[1], 1);
    const choices = layers.map((layer, at) => [String(at), `${layer.name} alone`]).reverse();
    if (layers.length > 1) choices.unshift(["all", `all layers together (${points})`]);
    else state.follow = "0";
    choices.push(["none", "none"]);
    for (const [value, text] of choices) {
      const label = document.createElement("label");
      const radio = Object.assign(document.createElement("input"), { type: "radio", name: "follow", value });
      radio.checked = value === state.follow;
      label.append(radio, text);
      element("layers").append(label);
    }

    const groups = layers.length ? Math.min(...layers.map((layer) => layer.groups)) : 1;
    element("group-row").hidden = groups === 1;
    addOptions(element("group"), Array.from({ length: groups }, (_, group) => String(group)));

    element("detection-row").hidden = detections.length === 0;
    element("box-mark").hidden = detections.length === 0;
    element("bin-mark").hidden = !detections.some((one) => one.bins);
    const options = [["none", "none"], ["all", `boxes of all ${detections.length}`]];
    element("detection").replaceChildren(
      ...options.map(([value, text]) => new Option(text, value)),
      ...detections.map((one, at) => new Option(one.label, String(at)))
    );
    if (detections.length) chooseDetection("0");
    else moveTo(start);
  }

  function chooseDetection(value) {
    state.detection = value;
    element("detection").value = value;
    const chosen = picture().detections[Number(value)];
    if (chosen) moveTo([(chosen.box[0] + chosen.box[2]) / 2, (chosen.box[1] + chosen.box[3]) / 2]);
    else show();
  }

  function stepDetection(by) {
    const number = picture().detections.length;
    if (number === 0) return;
    const at = Number(state.detection);
    chooseDetection(String(Number.isNaN(at) ? 0 : (at + by + number) % number));
  }

  function moveTo([x, y]) {
    const inside = (value, size) => Math.min(Math.max(value, 0), size);
    state.location = [inside(x, picture().width), inside(y, picture().height)];
    show();
  }

  function show() {
    const { layers } = picture();
    const [x, y] = state.location;
    const rounded = (value) => String(Math.round(value * 10) / 10);
    if (document.activeElement !== element("x")) element("x").value = rounded(x);
    if (document.activeElement !== element("y")) element("y").value = rounded(y);
    for (const name of ["plain", "deformable"]) {
      const deformed = name === "deformable";
      const hidden = layers.length === 0 || state.follow === "none";
      drawn[name] = hidden ? [] : trace(picture(), followed(), state.location, state.group, deformed);
      draw(element(name), drawn[name], deformed);
    }
    showNumbers();
  }

  function draw(canvas, points, deformed) {
    const { width, height, detections } = picture();
    const density = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * density);
    canvas.height = Math.round((canvas.width * height) / width);
    const scale = canvas.width / width; // canvas pixels per pixel of the picture
    const unit = density * Math.max(canvas.clientWidth / 480, 0.6);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(images[state.picture], 0, 0, canvas.width, canvas.height);
    context.lineJoin = "round";

    const disc = ([x, y], radius, colour) => {
      context.beginPath();
      context.arc(x * scale, y * scale, radius, 0, 2 * Math.PI);
      context.fillStyle = colour;
      context.fill();
    };
    const box = ([x1, y1, x2, y2], colour, line, fill) => {
      const corners = [x1 * scale, y1 * scale, (x2 - x1) * scale, (y2 - y1) * scale];
      context.strokeStyle = colour;
      context.lineWidth = line;
      if (fill) {
        context.fillStyle = fill;
        context.fillRect(...corners);
      }
      context.strokeRect(...corners);
    };

    const chosen = state.detection === "all" ? detections : detections.slice(Number(state.detection), Number(state.detection) + 1);
    if (state.detection !== "none") {
      for (const detection of chosen) {
        box(detection.box, "#ffffff", 5 * unit);
        box(detection.box, "#2878ff", 3 * unit);
        if (state.detection === "all" || !detection.bins) continue;
        const bins = deformed ? detection.bins : detection.binsAtRest;
        for (let at = 0; at < bins.length; at += 4) {
          const bin = bins.slice(at, at + 4);
          box(bin, "#003c46", 3 * unit, "rgba(0, 229, 255, 0.12)");
          box(bin, "#00e5ff", 1.5 * unit);
        }
      }
    }
    if (points.length) {
      context.beginPath();
      for (const [x, y] of convexHull(points)) context.lineTo(x * scale, y * scale);
      context.closePath();
      context.strokeStyle = "#3c3200";
      context.lineWidth = 4 * unit;
      context.stroke();
      context.strokeStyle = "#ffe128";
      context.lineWidth = 2 * unit;
      context.stroke();
    }
    // Few places, as those without offsets are, are drawn larger.
    const few = new Set(points.map((point) => point.map((value) => value.toFixed(2)).join())).size <= 100;
    const radius = (few ? 4 : 2.2) * unit;
    if (few) points.forEach((point) => disc(point, radius + 1.5 * unit, "#ffffff"));
    points.forEach((point) => disc(point, radius, few ? "#eb1e28" : "rgba(235, 30, 40, 0.8)"));
    disc(state.location, 9 * unit, "#000000");
    disc(state.location, 7.5 * unit, "#ffffff");
    disc(state.location, 6 * unit, "#28e65a");
  }

  function showNumbers() {
    const { layers, width, height } = picture();
    const [x, y] = state.location.map((value) => Math.round(value));
    if (layers.length === 0) {
      element("summary").textContent = `Location ${x}, ${y}. The network has no deformable convolution.`;
      return;
    }
    const size = (points) => extent(points).map((value) => Math.round(value)).join(" × ");
    const both = (chosen) => [false, true].map((deformed) => size(trace(picture(), chosen, state.location, state.group, deformed)));
    const dilations = layers.map((layer) => effectiveDilation(picture(), layer, state.location, state.group).toFixed(2));
    const rows = layers.map((layer, at) => [
      layer.name,
      layer.dilation[0] === layer.dilation[1] ? String(layer.dilation[0]) : layer.dilation.join(" × "),
      dilations[at],
      ...both([layer]),
    ]);
    rows.reverse();
    if (layers.length > 1) rows.push(["together", "", "", ...both(layers)]);
    element("table").replaceChildren(
      ...rows.map((cells) => {
        const row = document.createElement("tr");
        cells.forEach((text, at) => {
          const cell = document.createElement(at === 0 ? "th" : "td");
          if (at === 0) cell.scope = "row";
          cell.textContent = text;
          row.append(cell);
        });
        return row;
      })
    );
    const [plain, points] = [false, true].map((deformed) => trace(picture(), followed(), state.location, state.group, deformed));
    const outside = points.filter(([px, py]) => px < 0 || py < 0 || px > width || py > height).length;
    element("summary").textContent =
      `Location ${x}, ${y}: ${points.length} points over ${size(points)} pixels, ` +
      `${outside} outside the picture; without offsets over ${size(plain)}. Effective dilation: ` +
      layers.map((layer, at) => `${layer.name} ${dilations[at]}`).reverse().join(", ") + ".";
  }

  function onKey(event) {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const detectionStep = { PageUp: -1, PageDown: 1 }[event.key];
    if (event.ctrlKey || event.altKey || event.metaKey || !(direction || detectionStep)) return;
    event.preventDefault();
    if (detectionStep) return stepDetection(detectionStep);
    const { layers, ratio, width } = picture();
    const last = layers[layers.length - 1];
    const cell = last ? [last.outputStride[1] / ratio[0], last.outputStride[0] / ratio[1]] : [width / 50, width / 50];
    const step = event.shiftKey ? [1, 1] : cell;
    moveTo(state.location.map((value, axis) => value + direction[axis] * step[axis]));
  }

  function onPoint(event) {
    const canvas = event.currentTarget;
    const corner = canvas.getBoundingClientRect();
    const scale = picture().width / corner.width;
    moveTo([(event.clientX - corner.left) * scale, (event.clientY - corner.top) * scale]);
  }

  for (const name of ["plain", "deformable"]) {
    const canvas = element(name);
    canvas.addEventListener("keydown", onKey);
    canvas.addEventListener("click", onPoint);
    // A mouse may also drag the location; a finger scrolls the page.
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse" && event.buttons === 1) onPoint(event);
    });
  }
  element("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const [axis, name] of ["x", "y"].entries()) {
    element(name).addEventListener("input", () => {
      const value = element(name).valueAsNumber;
      if (Number.isFinite(value)) moveTo(state.location.map((old, at) => (at === axis ? value : old)));
    });
    element(name).addEventListener("blur", () => show());
  }
  element("layers").addEventListener("change", (event) => {
    state.follow = event.target.value;
    show();
  });
  element("group").addEventListener("change", () => {
    state.group = Number(element("group").value);
    show();
  });
  element("detection").addEventListener("change", () => chooseDetection(element("detection").value));
  element("picture-row").hidden = data.pictures.length === 1;
  addOptions(element("picture"), data.pictures.map((one) => one.name));
  element("picture").addEventListener("change", () => choosePicture(Number(element("picture").value)));
  window.addEventListener("resize", show);
  window.explorer = { state, drawn }; // for tests
  Promise.all(images.map((image) => image.decode())).then(() => choosePicture(0));
}

if (typeof document === "undefined") module.exports = { trace, effectiveDilation, convexHull };
else startExplorer();
