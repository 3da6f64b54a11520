/**
 * A request as a curl command for a POSIX shell. Text fields go through `--form-string`, because in `-F` a leading
 * `@` or `<` means a file; file names are quoted for curl, whose own separators are `;` and `,`, and then for the shell.
 */

/**
 * @param {string} url
 * @param {{image: string, mask: string | null, ipAdapterImage: string | null}} names of the files
 * @param {[string, string][]} fields
 * @param {boolean} hasKey
 */
export function curlCommand(url, names, fields, hasKey) {
  const values = Object.fromEntries(fields);
  const isMany = Number(values.num_images_per_prompt ?? 1) > 1;
  const output = isMany ? "out.json" : `out.${(values.output_format ?? "png").replace("jpeg", "jpg")}`;
  const lines = [`curl -sS --fail-with-body ${shellQuoted(url)} -o ${output}`];
  if (isMany) lines.push("-H 'Accept: application/json'");
  // The key itself is not written where it could end up in a shell's history.
  if (hasKey) lines.push('-H "Authorization: Bearer $INPAINT_KEY"');
  lines.push(fileArgument("image", names.image));
  if (names.mask) lines.push(fileArgument("mask", names.mask));
  if (names.ipAdapterImage) lines.push(fileArgument("ip_adapter_image", names.ipAdapterImage));
  for (const [name, value] of fields) lines.push(`--form-string ${shellQuoted(`${name}=${value}`)}`);
  return lines.join(" \\\n  ");
}

function fileArgument(field, name) {
  const isPlain = /^[\w.-]+$/.test(name);
  return `-F ${shellQuoted(`${field}=@${isPlain ? name : `"${name.replace(/[\\"]/g, "\\$&")}"`}`)}`;
}

function shellQuoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}
