/**
 * The result's side of the page: an unfinished picture while it is painted, then the images of a run, one large
 * beside what it was before, and the others to choose from.
 */

import { Compare } from "./compare.js";
import { byId, make } from "./elements.js";

/**
 * @typedef {object} Shown an image of an answer, as a file
 * @property {Blob} blob its very bytes
 * @property {string} url
 * @property {number} seed
 * @property {boolean} isFlagged
 * @property {number} width
 * @property {number} height
 */

/**
 * The images of an answer.
 * @param {any} answer of `POST /v1/inpaint`
 * @returns {Shown[]}
 */
export function imagesOf(answer) {
  return answer.images.map((image) => {
    const bytes = Uint8Array.from(atob(image.b64_json), (character) => character.charCodeAt(0));
    const blob = new Blob([bytes], { type: image.media_type });
    const { seed, width, height, nsfw_content_detected: isFlagged } = image;
    return { blob, url: URL.createObjectURL(blob), seed, isFlagged, width, height };
  });
}

export class Results {
  #compare = new Compare();
  #run = null;
  #index = 0;

  /** The image that is shown large, if any. */
  get shown() {
    return this.#run?.images[this.#index] ?? null;
  }

  /** Make room in the shape of the picture that is to be changed. */
  expect(picture) {
    byId("result-empty").style.setProperty("--aspect", picture.width / picture.height);
  }

  /**
   * A run begins: show what it starts from, until there is a preview.
   * @param {import("./picture.js").Picture} picture
   */
  begin(picture) {
    byId("withheld").hidden = true;
    byId("choices").hidden = byId("result-actions").hidden = true;
    byId("result-info").textContent = "";
    this.#compare.open(picture.url, picture.url, picture.width, picture.height, false);
    byId("result-frame").classList.add("running");
    byId("after").alt = "The picture so far";
    byId("bar").removeAttribute("value");
    byId("progress").hidden = false;
    this.say("Sending …");
  }

  /** What the run is doing. */
  say(text) {
    byId("progress-text").textContent = text;
  }

  /**
   * A step is done.
   * @param {{step: number, steps: number, eta: number | null, preview?: {b64_json: string, media_type: string}}} progress
   */
  progress({ step, steps, eta, preview }) {
    byId("bar").value = step / steps;
    const rest = eta ? ` · about ${eta < 10 ? eta.toFixed(1) : Math.round(eta)} s left` : "";
    this.say(`Step ${step} of ${steps}${rest}`);
    if (preview) {
      byId("after").src = `data:${preview.media_type};base64,${preview.b64_json}`;
      byId("result-frame").classList.add("previewing");
    }
  }

  /** The run ended without a picture: back to the one before, if there is one. */
  stop() {
    if (this.#run) {
      this.show(this.#run);
      return;
    }
    byId("progress").hidden = true;
    byId("result-frame").hidden = true;
    byId("result-frame").classList.remove("running", "previewing");
    byId("result-empty").hidden = false;
  }

  /**
   * Show a run.
   * @param {import("./history.js").Run} run
   */
  show(run) {
    byId("progress").hidden = true;
    byId("result-frame").classList.remove("running", "previewing");
    this.#run = run;
    const choices = run.images.map((image, index) => {
      const label = `Image ${index + 1}, seed ${image.seed}${image.isFlagged ? ", flagged" : ""}`;
      const button = make("button", { type: "button", className: "choice", title: label, "aria-label": label });
      button.append(make("img", { src: image.url, alt: "" }));
      if (isWithheld(run, image)) button.classList.add("flagged");
      button.addEventListener("click", () => this.#choose(index));
      return button;
    });
    byId("choices").replaceChildren(...choices);
    byId("choices").hidden = run.images.length < 2;
    byId("result-actions").hidden = false;
    this.#choose(0);
  }

  #choose(index) {
    this.#index = index;
    const { picture, answer, images } = this.#run;
    const image = images[index];
    const hasSameShape = image.width === picture.width && image.height === picture.height;
    this.#compare.open(picture.url, image.url, image.width, image.height, hasSameShape && !isWithheld(this.#run, image));
    byId("after").alt = image.isFlagged ? "Flagged by the safety checker" : `The result, seed ${image.seed}`;
    byId("withheld").hidden = !isWithheld(this.#run, image);
    [...byId("choices").children].forEach((button, place) => {
      button.setAttribute("aria-pressed", String(place === index));
    });
    const flag = image.isFlagged ? " · flagged" : "";
    const seconds = answer.timings.total.toFixed(1);
    byId("result-info").textContent = `Seed ${image.seed} · ${image.width}×${image.height} · ${seconds} s${flag}`;
    const type = image.blob.type.replace("image/", "").replace("jpeg", "jpg");
    const download = byId("download");
    download.href = image.url;
    download.download = `inpaint-${image.seed}.${type}`;
    download.hidden = byId("reuse").hidden = isWithheld(this.#run, image);
  }
}

/** Whether the operator's policy has withheld a flagged picture; with "flag" it is only marked. */
function isWithheld(run, image) {
  return image.isFlagged && run.nsfwPolicy !== "flag";
}
