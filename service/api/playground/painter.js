/**
 * Painting the mask over the picture: with mouse, pen or finger through pointer events, and with the keyboard.
 * The mask itself, and what a stroke does to it, are in mask.js.
 */

import { byId } from "./elements.js";
import { Mask } from "./mask.js";

const TINT = [225, 29, 72, 255]; // How much of the picture shows through is the style sheet's.

export class Painter {
  #canvas = byId("mask");
  #context = this.#canvas.getContext("2d");
  #frame = byId("frame");
  #ring = byId("cursor");
  #size = byId("brush-size");
  #erases = false;
  #at = { x: 0, y: 0 };
  #onChange;

  /** @param {() => void} onChange told after every change of the mask */
  constructor(onChange) {
    this.#onChange = onChange;
    this.mask = null;
    this.#listenToTools();
    this.#listenToPointer();
    this.#listenToKeys();
    this.#showTools();
  }

  /**
   * Show a picture and begin a mask for it.
   * @param {import("./picture.js").Picture} picture
   * @param {Uint8Array | null} pixels of the mask to begin with
   */
  open(picture, pixels = null) {
    byId("picture").src = picture.url;
    this.#frame.style.setProperty("--aspect", picture.width / picture.height);
    this.#frame.hidden = false;
    byId("empty").hidden = true;
    this.#canvas.width = picture.width;
    this.#canvas.height = picture.height;
    this.mask = new Mask(picture.width, picture.height, (rect) => this.#draw(rect));
    if (pixels) this.mask.pixels.set(pixels);
    const side = Math.max(picture.width, picture.height);
    this.#size.max = Math.max(8, Math.round(side / 2));
    this.#size.value = Math.max(1, Math.round(side / 10));
    this.#at = { x: picture.width / 2, y: picture.height / 2 };
    this.#draw({ x: 0, y: 0, width: picture.width, height: picture.height });
    this.#changed();
  }

  /** Take another mask for the same picture; undo brings back the one before. */
  replace(pixels) {
    this.mask.replace(pixels);
    this.#changed();
  }

  get #radius() {
    return Number(this.#size.value) / 2;
  }

  #draw({ x, y, width, height }) {
    const image = new ImageData(width, height);
    const words = new Uint32Array(image.data.buffer);
    const tint = new Uint32Array(new Uint8Array(TINT).buffer)[0];
    for (let row = 0; row < height; row += 1) {
      const start = (y + row) * this.mask.width + x;
      for (let column = 0; column < width; column += 1) {
        if (this.mask.pixels[start + column]) words[row * width + column] = tint;
      }
    }
    this.#context.putImageData(image, x, y);
  }

  #changed() {
    this.#showTools();
    this.#onChange();
  }

  // --- tools ---

  #listenToTools() {
    const edit = (change) => () => {
      if (!this.mask) return;
      change(this.mask);
      this.#changed();
    };
    byId("undo").addEventListener("click", edit((mask) => mask.undo()));
    byId("redo").addEventListener("click", edit((mask) => mask.redo()));
    byId("clear").addEventListener("click", edit((mask) => mask.fill(0)));
    byId("invert").addEventListener("click", edit((mask) => mask.invert()));
    byId("brush").addEventListener("click", () => this.#choose(false));
    byId("eraser").addEventListener("click", () => this.#choose(true));
    this.#size.addEventListener("input", () => this.#showRing());
  }

  #choose(erases) {
    this.#erases = erases;
    byId("brush").setAttribute("aria-pressed", String(!erases));
    byId("eraser").setAttribute("aria-pressed", String(erases));
  }

  #showTools() {
    byId("undo").disabled = !this.mask?.canUndo;
    byId("redo").disabled = !this.mask?.canRedo;
    byId("clear").disabled = byId("invert").disabled = byId("mask-file").disabled = !this.mask;
  }

  #resize(factor) {
    const size = Number(this.#size.value);
    this.#size.value = factor > 1 ? Math.max(size + 1, Math.round(size * factor)) : Math.floor(size * factor);
    this.#showRing();
  }

  // --- pointers ---

  #listenToPointer() {
    const canvas = this.#canvas;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !this.mask) return;
      event.preventDefault();
      canvas.focus({ preventScroll: true });
      canvas.setPointerCapture(event.pointerId);
      this.mask.begin(this.#erases);
      this.#strokeTo(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      this.#moveTo(event);
      if (!this.mask?.isPainting || !canvas.hasPointerCapture(event.pointerId)) return;
      const events = event.getCoalescedEvents?.() ?? [];
      for (const step of events.length ? events : [event]) this.#strokeTo(step);
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.#end());
    canvas.addEventListener("pointerleave", () => this.#showRing(document.activeElement === canvas));
  }

  #moveTo(event) {
    const box = this.#canvas.getBoundingClientRect();
    this.#at = {
      x: ((event.clientX - box.left) * this.#canvas.width) / box.width,
      y: ((event.clientY - box.top) * this.#canvas.height) / box.height,
    };
    this.#showRing();
  }

  #strokeTo(event) {
    this.#moveTo(event);
    this.mask.strokeTo(this.#at.x, this.#at.y, this.#radius);
  }

  #end() {
    if (!this.mask?.isPainting) return;
    this.mask.end();
    this.#changed();
  }

  /** The brush's outline, in shares of the picture so that it need not know the picture's size on the screen. */
  #showRing(isShown = true) {
    this.#ring.hidden = !isShown || !this.mask;
    if (!this.mask) return;
    const { width, height } = this.mask;
    const style = this.#ring.style;
    style.setProperty("--x", `${(100 * this.#at.x) / width}%`);
    style.setProperty("--y", `${(100 * this.#at.y) / height}%`);
    style.setProperty("--size", `${(200 * this.#radius) / width}%`);
  }

  // --- keys ---

  #listenToKeys() {
    this.#canvas.addEventListener("keydown", (event) => this.#onCanvasKey(event));
    this.#canvas.addEventListener("keyup", (event) => {
      if (event.key === " ") this.#end();
    });
    this.#canvas.addEventListener("focus", () => this.#showRing());
    this.#canvas.addEventListener("blur", () => {
      this.#end();
      this.#showRing(false);
    });
    addEventListener("keydown", (event) => this.#onPageKey(event));
  }

  #onCanvasKey(event) {
    const step = event.shiftKey ? 1 : Math.max(1, this.#radius / 2);
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.key === " ") {
      event.preventDefault();
      if (event.repeat || !this.mask) return;
      this.mask.begin(this.#erases);
    } else if (event.key in moves && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      const [dx, dy] = moves[event.key];
      this.#at.x = Math.min(this.#canvas.width, Math.max(0, this.#at.x + dx));
      this.#at.y = Math.min(this.#canvas.height, Math.max(0, this.#at.y + dy));
    } else {
      return;
    }
    if (this.mask?.isPainting) this.mask.strokeTo(this.#at.x, this.#at.y, this.#radius);
    this.#showRing();
  }

  #onPageKey(event) {
    if (event.target.closest?.("input:not([type=range]), textarea, select, pre")) return;
    const key = event.key.toLowerCase();
    if ((event.ctrlKey || event.metaKey) && !event.altKey) {
      const redoes = key === "y" || (key === "z" && event.shiftKey);
      if (!redoes && key !== "z") return;
      event.preventDefault();
      byId(redoes ? "redo" : "undo").click();
    } else if (!event.altKey && !event.ctrlKey && !event.metaKey) {
      if (key === "[") this.#resize(1 / 1.2);
      else if (key === "]") this.#resize(1.2);
      else if (key === "b") this.#choose(false);
      else if (key === "e") this.#choose(true);
    }
  }
}
