/**
 * Two pictures on top of each other, and a slider between them. The slider is an ordinary range input over the
 * pictures, so that it works by mouse, finger and keyboard alike.
 */

import { byId } from "./elements.js";

const START = 50;

export class Compare {
  #frame = byId("result-frame");
  #split = byId("split");

  constructor() {
    this.#split.addEventListener("input", () => this.#show());
  }

  /**
   * Show a pair.
   * @param {string} before address of the picture before; not compared where it has another shape than the result
   * @param {string} after
   * @param {number} width of the result
   * @param {number} height
   * @param {boolean} canCompare
   */
  open(before, after, width, height, canCompare) {
    byId("before").src = before;
    byId("after").src = after;
    this.#frame.style.setProperty("--aspect", width / height);
    this.#frame.hidden = false;
    byId("result-empty").hidden = true;
    this.#frame.classList.toggle("comparing", canCompare);
    this.#split.hidden = !canCompare;
    this.#split.value = canCompare ? START : 0;
    this.#show();
  }

  #show() {
    this.#frame.style.setProperty("--split", `${this.#split.value}%`);
  }
}
