/**
 * The form: what the served model offers goes in, the fields of a request come out. Only what differs from the
 * service's defaults is sent; whether it is valid is the service's to say.
 */

import { byId, make } from "./elements.js";
import { Loras } from "./loras.js";

export class Settings {
  #form = byId("form");
  #loras;
  #onChange;

  /** @param {() => void} onChange */
  constructor(onChange) {
    this.#onChange = onChange;
    this.#loras = new Loras(onChange);
    for (const control of this.#controls()) control.addEventListener("input", onChange); // Not all are inside the form.
    byId("loras").addEventListener("input", onChange);
    byId("ip-adapter-image").addEventListener("input", onChange);
    byId("dice").addEventListener("click", () => {
      this.set("seed", String(crypto.getRandomValues(new Uint32Array(1))[0]));
    });
  }

  /**
   * Offer what the model can do.
   * @param {any} model as `/v1/models` lists it
   * @param {string[]} loraNames
   */
  offer(model, loraNames) {
    const steps = this.#control("num_inference_steps");
    steps.placeholder = model.default_steps;
    steps.max = model.limits.max_steps;
    this.#control("clip_skip").max = model.limits.max_clip_skip;
    this.#control("num_images_per_prompt").max = model.limits.max_images_per_prompt;
    this.#control("prompt").maxLength = model.limits.max_prompt_characters;
    const scheduler = this.#control("scheduler");
    const chosen = scheduler.value;
    const options = model.schedulers.map((name) => make("option", { value: name }, name));
    scheduler.replaceChildren(make("option", { value: "" }, `default (${model.default_scheduler})`), ...options);
    scheduler.value = model.schedulers.includes(chosen) ? chosen : "";
    byId("ip-adapter").hidden = !model.ip_adapter?.takes_images;
    this.#loras.offer(loraNames);
  }

  /** The picture to paint by, if one is chosen. */
  get ipAdapterImage() {
    return byId("ip-adapter-image").files[0] ?? null;
  }

  /** @returns {[string, string][]} names and values of what differs from the defaults, and the prompt */
  get fields() {
    const fields = this.#controls()
      .map((control) => [control.name, valueOf(control), control.dataset.default])
      .filter(([name, value, usual]) => name === "prompt" || value !== usual)
      .map(([name, value]) => [name, value]);
    return this.#loras.field ? [...fields, ["loras", this.#loras.field]] : fields;
  }

  /** All values, to come back to. */
  get snapshot() {
    const values = Object.fromEntries(this.#controls().map((control) => [control.name, valueOf(control)]));
    return { values, loras: this.#loras.chosen };
  }

  set snapshot({ values, loras }) {
    for (const [name, value] of Object.entries(values)) show(this.#control(name), value);
    this.#loras.chosen = loras;
    this.#onChange();
  }

  get(name) {
    return valueOf(this.#control(name));
  }

  set(name, value) {
    show(this.#control(name), value);
    this.#onChange();
  }

  #control(name) {
    return this.#form.elements.namedItem(name);
  }

  #controls() {
    return [...this.#form.elements].filter((element) => element.name);
  }
}

function valueOf(control) {
  if (control.type === "checkbox") return String(control.checked);
  // What is no number reads as empty: then the service would paint with its default instead of complaining.
  return control.validity.badInput ? "?" : control.value;
}

function show(control, value) {
  if (control.type === "checkbox") control.checked = value === "true";
  else control.value = value;
}
