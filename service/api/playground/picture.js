/**
 * Files that people bring: a picture with its size as it is seen, and masks as bytes.
 */

import { uprightBlob } from "./orientation.js";

/**
 * @typedef {object} Picture
 * @property {File} file as it was chosen; this is what is sent
 * @property {string} url of what is shown
 * @property {number} width as seen, EXIF orientation applied
 * @property {number} height
 * @property {Uint8Array | null} transparent 255 where the picture is transparent; null where it nowhere is
 */

/**
 * Read a picture.
 * @param {File} file
 * @returns {Promise<Picture>}
 */
export async function readPicture(file) {
  const shown = await uprightBlob(file);
  const bitmap = await decode(shown);
  const { width, height } = bitmap;
  const transparent = file.type === "image/jpeg" ? null : transparency(bitmap);
  bitmap.close();
  return { file, url: URL.createObjectURL(shown), width, height, transparent };
}

/**
 * Read a mask file: at least half white is repainted.
 * @param {File} file
 * @param {number} width that it must have
 * @param {number} height
 * @returns {Promise<Uint8Array>}
 */
export async function readMask(file, width, height) {
  const bitmap = await decode(await uprightBlob(file));
  if (bitmap.width !== width || bitmap.height !== height) {
    throw new Error(`The mask has ${bitmap.width}×${bitmap.height} pixels, the picture ${width}×${height}.`);
  }
  const data = pixelsOf(bitmap, "black");
  bitmap.close();
  const mask = new Uint8Array(width * height);
  for (let i = 0; i < mask.length; i += 1) {
    const grey = 0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2];
    mask[i] = grey >= 127.5 ? 255 : 0;
  }
  return mask;
}

async function decode(blob) {
  try {
    return await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    throw new Error("This file is no picture that the browser can show.");
  }
}

function transparency(bitmap) {
  const data = pixelsOf(bitmap, null);
  const mask = new Uint8Array(bitmap.width * bitmap.height);
  let isAny = false;
  for (let i = 0; i < mask.length; i += 1) {
    if (data[4 * i + 3] < 128) {
      mask[i] = 255;
      isAny = true;
    }
  }
  return isAny ? mask : null;
}

function pixelsOf(bitmap, ground) {
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (ground) {
    context.fillStyle = ground;
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}
