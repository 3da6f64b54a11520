/**
 * The mask at the picture's own resolution: one byte a pixel, 255 is repainted. Edges are hard, since the service
 * knows only pixels that are repainted and pixels that are kept; what is painted is exactly what is sent.
 */

const MAX_UNDO_BYTES = 96 * 1024 * 1024;
const MAX_UNDO_STEPS = 200;

/** @typedef {{x: number, y: number, width: number, height: number}} Rect */

export class Mask {
  #undone = [];
  #done = [];
  #before = null;
  #touched = null;
  #last = null;
  #value = 255;

  /**
   * @param {number} width
   * @param {number} height
   * @param {(rect: Rect) => void} onChange told which pixels may have changed
   */
  constructor(width, height, onChange = () => {}) {
    this.width = width;
    this.height = height;
    this.pixels = new Uint8Array(width * height);
    this.onChange = onChange;
  }

  get canUndo() {
    return this.#done.length > 0;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  get isPainting() {
    return this.#before !== null;
  }

  /** Begin a stroke that paints, or erases. */
  begin(erases) {
    this.end();
    this.#before = this.pixels.slice();
    this.#value = erases ? 0 : 255;
    this.#touched = null;
    this.#last = null;
  }

  /** Continue the stroke to a point, in pixels, with a round brush. */
  strokeTo(x, y, radius) {
    const from = this.#last ?? { x, y };
    this.#last = { x, y };
    const rect = this.#capsule(from.x, from.y, x, y, Math.max(0.5, radius));
    if (!rect) return;
    this.#touched = this.#touched ? union(this.#touched, rect) : rect;
    this.onChange(rect);
  }

  /** End the stroke; undo takes it back as a whole. */
  end() {
    const before = this.#before;
    this.#before = null;
    if (before && this.#touched) this.#remember(this.#touched, before);
  }

  /** Set all pixels. */
  fill(value) {
    this.replace(new Uint8Array(this.pixels.length).fill(value));
  }

  invert() {
    this.replace(this.pixels.map((value) => 255 - value));
  }

  /** Take other pixels, as many, as one step that can be undone. */
  replace(pixels) {
    this.end();
    const before = this.pixels;
    this.pixels = pixels;
    const all = { x: 0, y: 0, width: this.width, height: this.height };
    this.#remember(all, before);
    this.onChange(all);
  }

  undo() {
    this.#swap(this.#done, this.#undone);
  }

  redo() {
    this.#swap(this.#undone, this.#done);
  }

  /** The mask as a black and white PNG file of the picture's size. */
  toPng() {
    const canvas = document.createElement("canvas");
    canvas.width = this.width;
    canvas.height = this.height;
    const context = canvas.getContext("2d", { alpha: false });
    const image = new ImageData(this.width, this.height);
    const words = new Uint32Array(image.data.buffer);
    for (let i = 0; i < words.length; i += 1) words[i] = this.pixels[i] ? 0xffffffff : 0xff000000;
    context.putImageData(image, 0, 0);
    return new Promise((resolve, reject) => {
      canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The mask is too large for this browser."))), "image/png");
    });
  }

  #remember(rect, before) {
    this.#done.push({ rect, pixels: cut(before, this.width, rect) });
    this.#undone = [];
    let bytes = this.#done.reduce((sum, step) => sum + step.pixels.length, 0);
    while (this.#done.length > 1 && (this.#done.length > MAX_UNDO_STEPS || bytes > MAX_UNDO_BYTES)) {
      bytes -= this.#done.shift().pixels.length;
    }
  }

  #swap(from, to) {
    this.end();
    const step = from.pop();
    if (!step) return;
    const { rect } = step;
    to.push({ rect, pixels: cut(this.pixels, this.width, rect) });
    for (let row = 0; row < rect.height; row += 1) {
      const line = step.pixels.subarray(row * rect.width, (row + 1) * rect.width);
      this.pixels.set(line, (rect.y + row) * this.width + rect.x);
    }
    this.onChange(rect);
  }

  /** Set the pixels whose centres lie within `radius` of a line; returns the rectangle around them, if any. */
  #capsule(x0, y0, x1, y1, radius) {
    const left = Math.max(0, Math.floor(Math.min(x0, x1) - radius));
    const top = Math.max(0, Math.floor(Math.min(y0, y1) - radius));
    const right = Math.min(this.width, Math.ceil(Math.max(x0, x1) + radius));
    const bottom = Math.min(this.height, Math.ceil(Math.max(y0, y1) + radius));
    if (left >= right || top >= bottom) return null;
    const dx = x1 - x0;
    const dy = y1 - y0;
    const length2 = dx * dx + dy * dy || 1;
    const limit = radius * radius;
    for (let row = top; row < bottom; row += 1) {
      const py = row + 0.5 - y0;
      for (let column = left; column < right; column += 1) {
        const px = column + 0.5 - x0;
        const t = Math.min(1, Math.max(0, (px * dx + py * dy) / length2));
        const ex = px - t * dx;
        const ey = py - t * dy;
        if (ex * ex + ey * ey <= limit) this.pixels[row * this.width + column] = this.#value;
      }
    }
    return { x: left, y: top, width: right - left, height: bottom - top };
  }
}

function union(a, b) {
  const x = Math.min(a.x, b.x);
  const y = Math.min(a.y, b.y);
  const width = Math.max(a.x + a.width, b.x + b.width) - x;
  const height = Math.max(a.y + a.height, b.y + b.height) - y;
  return { x, y, width, height };
}

function cut(pixels, stride, rect) {
  if (rect.width === stride) return pixels.slice(rect.y * stride, (rect.y + rect.height) * stride);
  const part = new Uint8Array(rect.width * rect.height);
  for (let row = 0; row < rect.height; row += 1) {
    const start = (rect.y + row) * stride + rect.x;
    part.set(pixels.subarray(start, start + rect.width), row * rect.width);
  }
  return part;
}
