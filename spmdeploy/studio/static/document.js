// The edit under way: photo, label map and mask as byte arrays of the photo's size, and their history.

import { encodeGray } from "./png.js";
import { dilate, polygon, region, stroke } from "./raster.js";

/**
 * @typedef {import("./raster.js").Point} Point
 * @typedef {import("./raster.js").Box} Box
 * @typedef {import("./api.js").EditResult} EditResult
 * @typedef {{blob: Blob, name: string, bitmap: ImageBitmap}} Photo
 * @typedef {{photo: Photo, width: number, height: number, labels: Uint8Array, base: Uint8Array, mask: Uint8Array,
 *   hasLabels: boolean, result: (EditResult & {bitmap: ImageBitmap}) | null}} State
 * @typedef {{label: string, bytes: number, tiles: Map<number, {labels: Uint8Array, mask: Uint8Array}> | null, state: State | null}} Change
 */

export const TILE = 256;
const HISTORY_BYTES = 256 << 20;

export class EditDocument {
  /**
   * @param {Photo} photo
   * @param {{ids: Uint8Array, width: number, height: number} | null} labels
   */
  constructor(photo, labels) {
    const { width, height } = photo.bitmap;
    const base = labels ? labels.ids : new Uint8Array(width * height);
    /** @type {State} */
    this.state = {
      photo, width, height, base, labels: base.slice(), mask: new Uint8Array(width * height),
      hasLabels: labels !== null, result: null,
    };
    /** @type {Change[]} */
    this.undoStack = [];
    /** @type {Change[]} */
    this.redoStack = [];
    /** @type {Set<number>} tiles whose overlay is out of date */
    this.dirty = new Set();
    /** @type {(() => void)} */
    this.onchange = () => {};
    /** @type {Change | null} */
    this.current = null;
    /** @type {{undo: Change[], redo: Change[], state: State} | null} what `rollback` returns to */
    this.before = null;
    this.masked = 0;
  }

  get columns() {
    return Math.ceil(this.state.width / TILE);
  }

  get rows() {
    return Math.ceil(this.state.height / TILE);
  }

  markAllDirty() {
    for (let i = 0; i < this.columns * this.rows; i++) this.dirty.add(i);
  }

  /** Begins a change that can be undone in one step.
   * @param {string} label */
  begin(label) {
    this.before = { undo: [...this.undoStack], redo: this.redoStack, state: this.state };
    if (this.state.result) this.replaceState("paint on the photo", { result: null });
    this.current = { label, bytes: 0, tiles: new Map(), state: null };
  }

  commit() {
    const change = this.current;
    this.current = null;
    if (!change?.tiles?.size) return;
    this._push(change);
    this._count();
    this.onchange();
  }

  /** Takes back the change under way as if it had never begun. */
  rollback() {
    const { current, before } = this;
    if (!current || !before) return;
    this.current = null;
    for (const [tile, copy] of current.tiles ?? []) this._pasteTile(tile, copy);
    if (this.state !== before.state) this.markAllDirty();
    this.state = before.state;
    this.undoStack = before.undo;
    this.redoStack = before.redo;
    this._count();
    this.onchange();
  }

  /** @param {Change} change */
  _push(change) {
    this.undoStack.push(change);
    this.redoStack = [];
    let bytes = this.undoStack.reduce((sum, one) => sum + one.bytes, 0);
    while (bytes > HISTORY_BYTES && this.undoStack.length > 1) bytes -= /** @type {Change} */ (this.undoStack.shift()).bytes;
  }

  _count() {
    let count = 0;
    const { mask } = this.state;
    for (let i = 0; i < mask.length; i++) if (mask[i]) count++;
    this.masked = count;
  }

  /**
   * Paints a run of pixels: mask and label at once, or the mask alone.
   * @param {number} left
   * @param {number} right exclusive
   * @param {number} y
   * @param {{id: number | null, erase: boolean}} paint id null keeps the labels
   */
  span(left, right, y, paint) {
    const { width, labels, base, mask } = this.state;
    for (let column = Math.floor(left / TILE); column <= Math.floor((right - 1) / TILE); column++) {
      this._keep(Math.floor(y / TILE) * this.columns + column);
    }
    const from = y * width + left;
    const to = y * width + right;
    if (paint.erase) {
      mask.fill(0, from, to);
      labels.set(base.subarray(from, to), from);
    } else {
      mask.fill(255, from, to);
      if (paint.id !== null) labels.fill(paint.id, from, to);
    }
  }

  /** Remembers a tile before its first change.
   * @param {number} tile */
  _keep(tile) {
    this.dirty.add(tile);
    const tiles = this.current?.tiles;
    if (!this.current || !tiles || tiles.has(tile)) return;
    const copy = this._copyTile(tile);
    tiles.set(tile, copy);
    this.current.bytes += copy.labels.length * 2;
  }

  /** @param {number} tile @returns {Box} */
  tileBox(tile) {
    const left = (tile % this.columns) * TILE;
    const top = Math.floor(tile / this.columns) * TILE;
    return { left, top, right: Math.min(left + TILE, this.state.width), bottom: Math.min(top + TILE, this.state.height) };
  }

  /** @param {number} tile */
  _copyTile(tile) {
    const { left, top, right, bottom } = this.tileBox(tile);
    const { width, labels, mask } = this.state;
    const size = (right - left) * (bottom - top);
    const copy = { labels: new Uint8Array(size), mask: new Uint8Array(size) };
    for (let y = top; y < bottom; y++) {
      const at = (y - top) * (right - left);
      copy.labels.set(labels.subarray(y * width + left, y * width + right), at);
      copy.mask.set(mask.subarray(y * width + left, y * width + right), at);
    }
    return copy;
  }

  /**
   * @param {number} tile
   * @param {{labels: Uint8Array, mask: Uint8Array}} copy
   */
  _pasteTile(tile, copy) {
    const { left, top, right, bottom } = this.tileBox(tile);
    const { width, labels, mask } = this.state;
    const across = right - left;
    for (let y = top; y < bottom; y++) {
      const at = (y - top) * across;
      labels.set(copy.labels.subarray(at, at + across), y * width + left);
      mask.set(copy.mask.subarray(at, at + across), y * width + left);
    }
    this.dirty.add(tile);
  }

  /** @param {Point} from @param {Point} to @param {number} radius @param {{id: number | null, erase: boolean}} paint */
  paintStroke(from, to, radius, paint) {
    stroke(from, to, radius, this.state.width, this.state.height, (left, right, y) => this.span(left, right, y, paint));
  }

  /** @param {Point[]} points @param {{id: number | null, erase: boolean}} paint */
  paintPolygon(points, paint) {
    this.begin(paint.erase ? "erase polygon" : "polygon");
    polygon(points, this.state.width, this.state.height, (left, right, y) => this.span(left, right, y, paint));
    this.commit();
  }

  /** @param {Point} from @param {Point} to @param {{id: number | null, erase: boolean}} paint */
  paintRectangle(from, to, paint) {
    const { width, height } = this.state;
    const left = Math.max(0, Math.floor(Math.min(from.x, to.x)));
    const right = Math.min(width, Math.floor(Math.max(from.x, to.x)) + 1);
    const top = Math.max(0, Math.floor(Math.min(from.y, to.y)));
    const bottom = Math.min(height, Math.floor(Math.max(from.y, to.y)) + 1);
    if (left >= right) return;
    this.begin("rectangle");
    for (let y = top; y < bottom; y++) this.span(left, right, y, paint);
    this.commit();
  }

  /** The region of equal labels around a point.
   * @param {Point} at @param {{id: number | null, erase: boolean}} paint */
  paintRegion(at, paint) {
    const { width, height, labels } = this.state;
    const [x, y] = [Math.floor(at.x), Math.floor(at.y)];
    if (x < 0 || y < 0 || x >= width || y >= height) return;
    /** @type {[number, number, number][]} */
    const spans = []; // collected first: painting changes what is compared
    region(labels, x, y, width, height, (left, right, row) => spans.push([left, right, row]));
    this.begin("fill");
    for (const [left, right, row] of spans) this.span(left, right, row, paint);
    this.commit();
  }

  /** Every pixel of one class becomes another.
   * @param {number} from @param {number} to */
  replaceClass(from, to) {
    const { width, height, labels } = this.state;
    this.begin("replace class");
    for (let y = 0; y < height; y++) {
      let start = -1;
      for (let x = 0; x <= width; x++) {
        const matches = x < width && labels[y * width + x] === from;
        if (matches && start < 0) start = x;
        if (!matches && start >= 0) {
          this.span(start, x, y, { id: to, erase: false });
          start = -1;
        }
      }
    }
    this.commit();
  }

  /** Grows or shrinks the mask; new pixels take the label of the chosen class.
   * @param {number} pixels @param {number | null} id */
  growMask(pixels, id) {
    const { width, height, mask } = this.state;
    const wanted = dilate(mask, width, height, pixels);
    this.begin(pixels > 0 ? "grow mask" : "shrink mask");
    for (let y = 0; y < height; y++) {
      let start = -1;
      for (let x = 0; x <= width; x++) {
        const differs = x < width && wanted[y * width + x] !== mask[y * width + x];
        if (differs && start < 0) start = x;
        if (!differs && start >= 0) {
          this.span(start, x, y, { id: pixels > 0 ? id : null, erase: pixels < 0 });
          start = -1;
        }
      }
    }
    this.commit();
  }

  clearMask() {
    this.begin("clear");
    for (let y = 0; y < this.state.height; y++) this.span(0, this.state.width, y, { id: null, erase: true });
    this.commit();
  }

  /** A change of the whole state: a result, another photo.
   * @param {string} label @param {Partial<State>} change */
  replaceState(label, change) {
    this._push({ label, bytes: 64, tiles: null, state: this.state });
    this.state = { ...this.state, ...change };
    this._count();
    this.markAllDirty();
    this.onchange();
  }

  /** The result becomes the photo to go on with.
   * @param {ImageBitmap} bitmap */
  acceptResult(bitmap) {
    const { result, labels, hasLabels, width, height } = this.state;
    if (!result) return;
    const same = bitmap.width === width && bitmap.height === height;
    const size = bitmap.width * bitmap.height;
    this.replaceState("use the result as photo", {
      photo: { blob: result.blob, name: this.state.photo.name.replace(/\.\w+$/, "") + ".png", bitmap },
      width: bitmap.width, height: bitmap.height, result: null, hasLabels: same && hasLabels,
      base: same ? labels.slice() : new Uint8Array(size),
      labels: same ? labels.slice() : new Uint8Array(size),
      mask: new Uint8Array(size),
    });
  }

  undo() {
    this._swap(this.undoStack, this.redoStack);
  }

  redo() {
    this._swap(this.redoStack, this.undoStack);
  }

  /** @param {Change[]} from @param {Change[]} to */
  _swap(from, to) {
    const change = from.pop();
    if (!change) return;
    if (change.tiles) {
      /** @type {Map<number, {labels: Uint8Array, mask: Uint8Array}>} */
      const now = new Map();
      for (const [tile, copy] of change.tiles) {
        now.set(tile, this._copyTile(tile));
        this._pasteTile(tile, copy);
      }
      to.push({ ...change, tiles: now });
    } else if (change.state) {
      to.push({ ...change, state: this.state });
      this.state = change.state;
      this.markAllDirty();
    }
    this._count();
    this.onchange();
  }

  labelsBlob() {
    return encodeGray(this.state.labels, this.state.width, this.state.height);
  }

  maskBlob() {
    return encodeGray(this.state.mask, this.state.width, this.state.height);
  }
}
