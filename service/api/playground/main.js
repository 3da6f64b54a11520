/**
 * The playground: what belongs together, and what happens when. Everything else is in the module of its name.
 */

import * as api from "./api.js";
import { curlCommand } from "./curl.js";
import { byId, make } from "./elements.js";
import { clearFaults, showFault, showFieldFault } from "./faults.js";
import { History } from "./history.js";
import { watchFiles } from "./intake.js";
import { Painter } from "./painter.js";
import { readMask, readPicture } from "./picture.js";
import { whenReady } from "./readiness.js";
import { Results, imagesOf } from "./results.js";
import { Settings } from "./settings.js";

const DEMO_PROMPTS = ["a red house", "a green tree", "a yellow balloon", "nothing", "a pirate flag"];

// After these the service, or the key to it, is to be waited for again.
const LOST = new Set(["unauthorized", "not_ready", "draining"]);

let model = null;
let picture = null;
let running = null;

const painter = new Painter(showCurl);
const settings = new Settings(showCurl);
const results = new Results();
const history = new History(restore);

// --- the service ---

async function connect() {
  model = null;
  showRun();
  const ready = await whenReady(askForKey);
  model = ready.model;
  settings.offer(model, ready.loraNames);
  byId("model").textContent = model.id;
  byId("model").title = model.description;
  byId("model").hidden = false;
  const isDemo = model.kind === "demo";
  byId("demo").hidden = byId("ideas").hidden = !isDemo;
  if (isDemo) await showExample();
  showRun();
}

async function showExample() {
  byId("ideas").replaceChildren(
    ...DEMO_PROMPTS.map((prompt) => {
      const button = make("button", { type: "button", className: "idea" }, prompt);
      button.addEventListener("click", () => settings.set("prompt", prompt));
      return button;
    }),
  );
  if (picture) return;
  const [scene, mask] = await Promise.all([exampleFile("scene.png"), exampleFile("mask.png")]);
  const example = await readPicture(scene);
  if (picture) return; // Somebody was faster.
  openPicture(example, await readMask(mask, example.width, example.height));
  if (!settings.get("prompt")) settings.set("prompt", DEMO_PROMPTS[0]);
}

async function exampleFile(name) {
  const answer = await fetch(api.address(`playground/example/${name}`));
  return new File([await answer.blob()], name, { type: "image/png" });
}

function askForKey() {
  showKeyForm(true);
  byId("key-hint").textContent = api.key() ? "The service does not know this key." : "This service asks for a key.";
  byId("key").focus();
  return new Promise((resolve) => {
    byId("key-form").addEventListener("submit", () => resolve(), { once: true });
  });
}

function showKeyForm(isShown) {
  byId("key-form").hidden = !isShown;
  byId("key-toggle").setAttribute("aria-expanded", String(isShown));
}

byId("key-toggle").addEventListener("click", () => {
  showKeyForm(byId("key-form").hidden);
  if (!byId("key-form").hidden) byId("key").focus();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    api.setKey(byId("key").value.trim());
    showKeyForm(false);
  } catch (error) {
    byId("key-hint").textContent = error.message;
  }
  byId("key").value = "";
  showCurl();
});

// --- picture and mask ---

watchFiles(
  (file) => guarded("image", async () => openPicture(await readPicture(file))),
  (file) => guarded("mask", async () => {
    if (!painter.mask) return;
    painter.replace(await readMask(file, picture.width, picture.height));
  }),
);

async function guarded(field, work) {
  clearFaults();
  try {
    await work();
  } catch (error) {
    showFieldFault(field, error.message);
  }
}

/** Show a picture to be changed; without a mask, what is transparent in it is the mask. */
function openPicture(opened, mask = opened.transparent) {
  const limit = model?.limits.max_pixels ?? Infinity;
  if (opened.width * opened.height > limit) {
    URL.revokeObjectURL(opened.url);
    throw new Error(`The picture has ${opened.width}×${opened.height} pixels; the service takes ${limit} in all.`);
  }
  picture = opened;
  painter.open(picture, mask);
  results.expect(picture);
  byId("picture-info").textContent = `${picture.width}×${picture.height}`;
  showRun();
  showCurl();
  tell("Picture opened.");
}

// --- a run ---

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (model && picture && !running) run();
});
byId("form").elements.prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("form").requestSubmit();
});
byId("cancel").addEventListener("click", () => running?.abort());

async function run() {
  const started = picture;
  const mask = painter.mask.pixels.slice();
  const snapshot = settings.snapshot;
  running = new AbortController();
  clearFaults();
  showRun();
  results.begin(started);
  byId("result-frame").scrollIntoView({ block: "nearest" });
  tell("Sent.");
  try {
    const answer = await api.inpaint(await requestForm(), running.signal, onEvent);
    const images = imagesOf(answer);
    answer.images = null; // The files are enough.
    const done = { picture: started, mask, settings: snapshot, answer, images, nsfwPolicy: model.nsfw_policy };
    history.add(done);
    results.show(done);
    tell(images.some((image) => image.isFlagged) ? "Done. The safety checker flagged a picture." : "Done.");
  } catch (error) {
    results.stop();
    if (running.signal.aborted) tell("Cancelled.");
    else onFailure(error);
  } finally {
    running = null;
    showRun();
  }
}

async function requestForm() {
  const form = new FormData();
  form.append("image", picture.file);
  form.append("mask", await painter.mask.toPng(), "mask.png");
  for (const [name, value] of settings.fields) form.append(name, value);
  if (settings.ipAdapterImage) form.append("ip_adapter_image", settings.ipAdapterImage);
  form.append("previews", "true");
  return form;
}

function onEvent(event, data) {
  if (event === "queued") {
    const text = data.position > 0 ? `Waiting, ${data.position} before this one` : "Starting …";
    results.say(text);
    tell(text);
  } else if (event === "progress") {
    results.progress(data);
    const isQuarter = Math.floor((4 * data.step) / data.steps) > Math.floor((4 * (data.step - 1)) / data.steps);
    if (isQuarter) tell(`Step ${data.step} of ${data.steps}`); // Each step would be too much to listen to.
  }
}

function onFailure(error) {
  showFault(error);
  tell("Not painted.");
  if (LOST.has(error.code)) connect();
}

function showRun() {
  const button = byId("run");
  button.disabled = !model || !picture;
  button.setAttribute("aria-disabled", String(running !== null)); // Not disabled: it would lose the keyboard's focus.
  button.textContent = running ? "Painting …" : "Paint";
  if (!running && document.activeElement === byId("cancel")) button.focus();
  byId("cancel").hidden = running === null;
}

function tell(text) {
  byId("live").textContent = text;
}

// --- what can be done with a result ---

byId("reuse").addEventListener("click", () => guarded("image", async () => {
  const { blob } = results.shown;
  openPicture(await readPicture(new File([blob], byId("download").download, { type: blob.type })));
}));
byId("keep-seed").addEventListener("click", () => settings.set("seed", String(results.shown.seed)));

function restore(run) {
  if (running) return;
  clearFaults();
  settings.snapshot = run.settings;
  openPicture(run.picture, run.mask);
  results.show(run);
  tell("An earlier run is back.");
}

// --- as a command ---

function showCurl() {
  if (!picture) return;
  const names = { image: picture.file.name, mask: "mask.png", ipAdapterImage: settings.ipAdapterImage?.name ?? null };
  byId("curl").textContent = curlCommand(api.address("v1/inpaint"), names, settings.fields, api.key() !== "");
}

byId("copy-curl").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(byId("curl").textContent);
    tell("Copied.");
    byId("copy-curl").textContent = "Copied";
  } catch {
    // Only pages of https and of this machine may write there: select it, so that the person can copy it.
    getSelection().selectAllChildren(byId("curl"));
    byId("copy-curl").textContent = "Selected; copy it with Ctrl+C";
  }
  setTimeout(() => (byId("copy-curl").textContent = "Copy"), 2000);
});
byId("save-image").addEventListener("click", () => save(picture?.file, picture?.file.name));
byId("save-mask").addEventListener("click", async () => save(await painter.mask?.toPng(), "mask.png"));

function save(blob, name) {
  if (!blob) return;
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

connect();
