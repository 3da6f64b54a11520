/**
 * The ways in which a picture file gets onto the page: chosen, dropped, pasted.
 */

import { byId } from "./elements.js";

/**
 * @param {(file: File) => void} onPicture
 * @param {(file: File) => void} onMask
 */
export function watchFiles(onPicture, onMask) {
  choose(byId("image-file"), onPicture);
  choose(byId("image-file-2"), onPicture);
  choose(byId("mask-file"), onMask);

  const target = byId("drop");
  addEventListener("dragover", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault(); // Else the browser would leave the page for the file.
    target.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) target.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    target.classList.remove("dropping");
    const file = event.dataTransfer?.files[0];
    if (file) onPicture(file);
  });
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((item) => item.type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    onPicture(file);
  });
}

function choose(input, onFile) {
  input.addEventListener("change", () => {
    const file = input.files[0];
    input.value = ""; // So that the same file can be chosen again.
    if (file) onFile(file);
  });
}
