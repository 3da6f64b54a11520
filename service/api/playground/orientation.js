/**
 * Browsers turn JPEG and PNG pictures as their EXIF orientation asks, but not every one does so with WebP, while the
 * service turns all three. So a WebP file that is to be turned is shown as a turned copy; what is sent stays the file.
 */

const UPRIGHT = 1;

/**
 * A picture as the service sees it: the file itself, or of a turned WebP an upright copy.
 * @param {Blob} file
 * @returns {Promise<Blob>}
 */
export async function uprightBlob(file) {
  const bytes = new Uint8Array(await file.slice(0, 12).arrayBuffer());
  if (text(bytes, 0) !== "RIFF" || text(bytes, 8) !== "WEBP") return file;
  const whole = new Uint8Array(await file.arrayBuffer());
  const place = exifPlace(whole);
  const orientation = place === null ? UPRIGHT : orientationOf(whole, place);
  if (orientation === UPRIGHT) return file;
  whole.set([0x58, 0x58, 0x58, 0x58], place - 8); // An unknown chunk: no browser turns the copy a second time.
  const bitmap = await createImageBitmap(new Blob([whole], { type: "image/webp" }));
  return turned(bitmap, orientation);
}

/** Where the content of the EXIF chunk of a RIFF file begins. */
function exifPlace(bytes) {
  const view = new DataView(bytes.buffer);
  for (let at = 12; at + 8 <= bytes.length; ) {
    if (text(bytes, at) === "EXIF") return at + 8;
    const size = view.getUint32(at + 4, true);
    at += 8 + size + (size % 2);
  }
  return null;
}

/** Tag 0x0112 of the first directory of a TIFF block, 1 where there is none or the block is broken. */
function orientationOf(bytes, place) {
  try {
    const start = text(bytes, place) === "Exif" ? place + 6 : place;
    const view = new DataView(bytes.buffer, start);
    const isLittle = view.getUint16(0) === 0x4949;
    const directory = view.getUint32(4, isLittle);
    const entries = view.getUint16(directory, isLittle);
    for (let entry = 0; entry < entries; entry += 1) {
      const at = directory + 2 + 12 * entry;
      if (view.getUint16(at, isLittle) === 0x0112) {
        const value = view.getUint16(at + 8, isLittle);
        return value >= 1 && value <= 8 ? value : UPRIGHT;
      }
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return UPRIGHT;
}

/** A PNG file of the bitmap, turned and flipped. */
function turned(bitmap, orientation) {
  const { width, height } = bitmap;
  const swaps = orientation >= 5;
  const canvas = document.createElement("canvas");
  canvas.width = swaps ? height : width;
  canvas.height = swaps ? width : height;
  const context = canvas.getContext("2d");
  // From stored to upright coordinates, as EXIF 2.32 defines the eight.
  const matrices = {
    2: [-1, 0, 0, 1, width, 0],
    3: [-1, 0, 0, -1, width, height],
    4: [1, 0, 0, -1, 0, height],
    5: [0, 1, 1, 0, 0, 0],
    6: [0, 1, -1, 0, height, 0],
    7: [0, -1, -1, 0, height, width],
    8: [0, -1, 1, 0, 0, width],
  };
  context.setTransform(...matrices[orientation]);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function text(bytes, at) {
  return String.fromCharCode(...bytes.subarray(at, at + 4));
}
