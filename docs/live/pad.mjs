/** The square to draw on: what is drawn, dropped or painted there, as a digit of 8 x 8 levels of ink in 0..16. */

export const SIZE = 8; // of a digit, in pixels

/** A digit onto a square canvas. */
export function paint(canvas, levels) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const size = canvas.width;
  context.clearRect(0, 0, size, size);
  context.fillStyle = "#000";
  const step = size / SIZE;
  levels.forEach((level, i) => {
    context.globalAlpha = level / 16;
    context.fillRect((i % SIZE) * step, Math.floor(i / SIZE) * step, step, step);
  });
  context.globalAlpha = 1;
}

/** What is on the canvas as a digit: its ink, cut out, as large as the square, in the middle; null where there is none. */
function drawn(pad) {
  const { width, height } = pad;
  const ink = pad.getContext("2d");
  const dark = (x, y, data) => data[4 * (y * width + x) + 3] > 127;
  const { data } = ink.getImageData(0, 0, width, height);
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (!dark(x, y, data)) continue;
      [left, top] = [Math.min(left, x), Math.min(top, y)];
      [right, bottom] = [Math.max(right, x), Math.max(bottom, y)];
    }
  }
  if (right < 0) return null;
  const small = new OffscreenCanvas(4 * SIZE, 4 * SIZE).getContext("2d", { willReadFrequently: true });
  const [w, h] = [right - left + 1, bottom - top + 1];
  const scale = (4 * SIZE) / Math.max(w, h);
  small.imageSmoothingQuality = "high";
  small.drawImage(pad, left, top, w, h, (4 * SIZE - w * scale) / 2, (4 * SIZE - h * scale) / 2, w * scale, h * scale);
  const fine = small.getImageData(0, 0, 4 * SIZE, 4 * SIZE).data;
  const levels = new Array(SIZE * SIZE).fill(0); // inked pixels of each 4 x 4 block
  for (let i = 0; i < 16 * SIZE * SIZE; i++) {
    levels[Math.floor(i / (16 * SIZE)) * SIZE + Math.floor((i % (4 * SIZE)) / 4)] += fine[4 * i + 3] > 127 ? 1 : 0;
  }
  return levels;
}

/** A picture of a digit from a file onto the canvas: what differs from its corner is ink. */
async function place(pad, file) {
  const bitmap = await createImageBitmap(file);
  const { width, height } = pad;
  const ink = pad.getContext("2d");
  const scale = Math.min(width / bitmap.width, height / bitmap.height);
  ink.clearRect(0, 0, width, height);
  ink.drawImage(bitmap, 0, 0, bitmap.width * scale, bitmap.height * scale);
  const image = ink.getImageData(0, 0, width, height);
  const light = (i) => ((image.data[i] + image.data[i + 1] + image.data[i + 2]) / 3) * (image.data[i + 3] / 255);
  const corner = light(0);
  for (let i = 0; i < image.data.length; i += 4) {
    image.data[i + 3] = image.data[i + 3] && Math.abs(light(i) - corner) > 96 ? 255 : 0;
  }
  ink.putImageData(image, 0, 0);
}

/**
 * Let the user draw on a canvas, or drop a picture on it.
 *
 * @param begins called before a line is drawn.
 * @param shows called with the digit after each line and picture.
 * @param fails called where a file is no picture.
 * @returns a function that takes a picture's file, as if it were dropped.
 */
export function listen(pad, { begins, shows, fails }) {
  const ink = pad.getContext("2d");
  let from = null;
  const point = ({ clientX, clientY }) => {
    const box = pad.getBoundingClientRect();
    return [clientX - box.left, clientY - box.top];
  };
  const take = (file) => place(pad, file).then(() => shows(drawn(pad)), fails);
  pad.addEventListener("pointerdown", (event) => {
    begins();
    from = point(event);
    pad.setPointerCapture(event.pointerId);
  });
  pad.addEventListener("pointermove", (event) => {
    if (!from) return;
    const to = point(event);
    Object.assign(ink, { lineWidth: pad.width / 9, lineCap: "round", strokeStyle: "#000" });
    ink.beginPath();
    ink.moveTo(...from);
    ink.lineTo(...to);
    ink.stroke();
    from = to;
  });
  pad.addEventListener("pointerup", () => {
    from = null;
    shows(drawn(pad));
  });
  pad.addEventListener("dragover", (event) => event.preventDefault());
  pad.addEventListener("drop", (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) take(file);
  });
  return take;
}
