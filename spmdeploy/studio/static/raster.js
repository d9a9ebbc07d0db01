// Draws shapes into byte masks: every function calls `set(index)` once or more for each pixel of the shape.

/**
 * @typedef {{x: number, y: number}} Point
 * @typedef {{left: number, top: number, right: number, bottom: number}} Box right and bottom exclusive
 */

/**
 * A stroke with a round brush from one point to another.
 * @param {Point} from
 * @param {Point} to
 * @param {number} radius
 * @param {number} width
 * @param {number} height
 * @param {(left: number, right: number, y: number) => void} span right exclusive
 */
export function stroke(from, to, radius, width, height, span) {
  const top = Math.max(0, Math.ceil(Math.min(from.y, to.y) - radius));
  const bottom = Math.min(height - 1, Math.floor(Math.max(from.y, to.y) + radius));
  const dx = to.x - from.x;
  const dy = to.y - from.y;
  const length = Math.hypot(dx, dy);
  for (let y = top; y <= bottom; y++) {
    let low = Infinity;
    let high = -Infinity;
    for (const end of [from, to]) {
      const half = radius * radius - (y - end.y) ** 2;
      if (half >= 0) {
        low = Math.min(low, end.x - Math.sqrt(half));
        high = Math.max(high, end.x + Math.sqrt(half));
      }
    }
    if (length > 0) {
      // The rectangle between the ends: the row's intersection with its four edges.
      const nx = (-dy / length) * radius;
      const ny = (dx / length) * radius;
      const corners = [
        { x: from.x + nx, y: from.y + ny }, { x: to.x + nx, y: to.y + ny },
        { x: to.x - nx, y: to.y - ny }, { x: from.x - nx, y: from.y - ny },
      ];
      for (let i = 0; i < 4; i++) {
        const a = corners[i];
        const b = corners[(i + 1) % 4];
        if (Math.min(a.y, b.y) <= y && y <= Math.max(a.y, b.y) && a.y !== b.y) {
          const x = a.x + ((y - a.y) / (b.y - a.y)) * (b.x - a.x);
          low = Math.min(low, x);
          high = Math.max(high, x);
        }
      }
    }
    const left = Math.max(0, Math.ceil(low));
    const right = Math.min(width, Math.floor(high) + 1);
    if (left < right) span(left, right, y);
  }
}

/**
 * The inside of a polygon (even-odd rule, pixel centers).
 * @param {Point[]} points
 * @param {number} width
 * @param {number} height
 * @param {(left: number, right: number, y: number) => void} span
 */
export function polygon(points, width, height, span) {
  const top = Math.max(0, Math.floor(Math.min(...points.map((p) => p.y))));
  const bottom = Math.min(height - 1, Math.ceil(Math.max(...points.map((p) => p.y))));
  for (let y = top; y <= bottom; y++) {
    const crossings = [];
    for (let i = 0; i < points.length; i++) {
      const a = points[i];
      const b = points[(i + 1) % points.length];
      if (a.y <= y !== b.y <= y) crossings.push(a.x + ((y - a.y) / (b.y - a.y)) * (b.x - a.x));
    }
    crossings.sort((a, b) => a - b);
    for (let i = 0; i + 1 < crossings.length; i += 2) {
      const left = Math.max(0, Math.ceil(crossings[i]));
      const right = Math.min(width, Math.floor(crossings[i + 1]) + 1);
      if (left < right) span(left, right, y);
    }
  }
}

/**
 * The 4-connected region of equal values around a pixel.
 * @param {Uint8Array} values
 * @param {number} x
 * @param {number} y
 * @param {number} width
 * @param {number} height
 * @param {(left: number, right: number, y: number) => void} span
 */
export function region(values, x, y, width, height, span) {
  const wanted = values[y * width + x];
  const seen = new Uint8Array(width * height);
  const stack = [[x, y]];
  while (stack.length) {
    const [sx, sy] = /** @type {number[]} */ (stack.pop());
    const row = sy * width;
    if (seen[row + sx]) continue;
    let left = sx;
    let right = sx + 1;
    while (left > 0 && values[row + left - 1] === wanted && !seen[row + left - 1]) left--;
    while (right < width && values[row + right] === wanted && !seen[row + right]) right++;
    seen.fill(1, row + left, row + right);
    span(left, right, sy);
    for (const ny of [sy - 1, sy + 1]) {
      if (ny < 0 || ny >= height) continue;
      for (let nx = left; nx < right; nx++) {
        const at = ny * width + nx;
        if (values[at] === wanted && !seen[at] && (nx === left || values[at - 1] !== wanted || seen[at - 1])) stack.push([nx, ny]);
      }
    }
  }
}

/**
 * Grows (pixels > 0) or shrinks (pixels < 0) a mask by whole pixels in rows and columns, as `--grow` does.
 * @param {Uint8Array} mask 0 or 255
 * @param {number} width
 * @param {number} height
 * @param {number} pixels
 * @returns {Uint8Array}
 */
export function dilate(mask, width, height, pixels) {
  const target = pixels > 0 ? 255 : 0;
  const reach = Math.abs(pixels);
  const along = (/** @type {Uint8Array} */ source, /** @type {number} */ step, /** @type {number} */ count, /** @type {number} */ lines, /** @type {number} */ lineStep) => {
    const out = source.slice();
    for (let line = 0; line < lines; line++) {
      let last = -Infinity;
      for (let k = 0; k < count; k++) {
        const at = line * lineStep + k * step;
        if (source[at] === target) last = k;
        else if (k - last <= reach) out[at] = target;
      }
      last = Infinity;
      for (let k = count - 1; k >= 0; k--) {
        const at = line * lineStep + k * step;
        if (source[at] === target) last = k;
        else if (last - k <= reach) out[at] = target;
      }
    }
    return out;
  };
  return along(along(mask, 1, width, height, width), width, height, width, 1);
}
