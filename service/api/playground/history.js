/**
 * The runs of this session, in this tab's memory alone. The oldest make room.
 */

import { byId, make } from "./elements.js";

const MAX_RUNS = 24;

/**
 * @typedef {object} Run
 * @property {import("./picture.js").Picture} picture
 * @property {Uint8Array} mask
 * @property {Record<string, any>} settings as the form gave them
 * @property {any} answer without its images
 * @property {import("./results.js").Shown[]} images
 * @property {string} nsfwPolicy the operator's
 */

export class History {
  #runs = [];
  #onChoose;

  /** @param {(run: Run) => void} onChoose */
  constructor(onChoose) {
    this.#onChoose = onChoose;
  }

  /**
   * Note a run.
   * @param {Run} run
   */
  add(run) {
    const image = run.images[0];
    const label = `${run.answer.parameters.prompt}, seed ${image.seed}`;
    const button = make("button", { type: "button", className: "choice", title: label, "aria-label": label });
    button.append(make("img", { src: image.url, alt: "" }));
    button.classList.toggle("flagged", image.isFlagged && run.nsfwPolicy !== "flag");
    button.addEventListener("click", () => this.#onChoose(run));
    this.#runs.unshift(run);
    byId("history-items").prepend(button);
    byId("history").hidden = false;
    if (this.#runs.length > MAX_RUNS) {
      byId("history-items").lastElementChild.remove();
      for (const old of this.#runs.pop().images) URL.revokeObjectURL(old.url);
    }
  }
}
