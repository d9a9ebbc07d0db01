// The canvas: draws photo, overlay and result at any zoom, and turns pointers and keys into strokes.

import { TILE } from "./document.js";

/**
 * @typedef {import("./document.js").EditDocument} EditDocument
 * @typedef {import("./raster.js").Point} Point
 * @typedef {"brush" | "eraser" | "polygon" | "rectangle" | "bucket" | "picker" | "replace" | "pan"} Tool
 * @typedef {{tool: Tool, classId: number, radius: number, maskOnly: boolean, opacity: number, outline: boolean,
 *   showLabels: boolean, showWindows: boolean, compare: boolean, showOriginal: boolean,
 *   colors: [number, number, number][]}} Settings
 */

const MIN_ZOOM = 0.02;
const MAX_ZOOM = 40;
const TILES_PER_FRAME = 24;

export class Surface {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {{onhover: (at: Point | null) => void, onpick: (id: number) => void, onview: (zoom: number) => void}} events
   */
  constructor(canvas, events) {
    this.canvas = canvas;
    this.events = events;
    this.context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { alpha: false }));
    /** @type {EditDocument | null} */
    this.document = null;
    /** @type {Settings | null} */
    this.settings = null;
    this.zoom = 1;
    this.offset = { x: 0, y: 0 };
    this.divider = 0.5;
    /** @type {Map<number, OffscreenCanvas | null>} null: nothing to draw */
    this.overlay = new Map();
    /** @type {Point | null} */
    this.cursor = null;
    /** @type {Point[]} */
    this.points = [];
    /** @type {{from: Point, last: Point} | null} */
    this.drag = null;
    /** @type {Map<number, Point>} pointers on the canvas, in CSS pixels */
    this.pointers = new Map();
    /** @type {number | null} the pen on the canvas: touches, such as of the palm, are ignored meanwhile */
    this.pen = null;
    this.penErases = false;
    /** @type {Point | null} where a tool that acts on release was pressed */
    this.pressed = null;
    this.panning = false;
    this.spaceHeld = false;
    this.requested = false;
    new ResizeObserver(() => this.resize()).observe(canvas);
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", (event) => {
      this.cancelStroke();
      this.up(event);
    });
    canvas.addEventListener("pointerleave", () => {
      this.cursor = null;
      this.events.onhover(null);
      this.draw();
    });
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("dblclick", () => this.closePolygon());
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  }

  /** @param {EditDocument} document */
  open(document) {
    this.document = document;
    this.points = [];
    this.overlay.clear();
    document.markAllDirty();
    this.fit();
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth, clientHeight } = this.canvas;
    const first = this.canvas.width <= 1;
    this.canvas.width = Math.max(1, Math.round(clientWidth * ratio));
    this.canvas.height = Math.max(1, Math.round(clientHeight * ratio));
    if (first) this.fit();
    this.draw();
  }

  fit() {
    if (!this.document) return;
    const { width, height } = this.document.state;
    const { clientWidth, clientHeight } = this.canvas;
    this.zoom = Math.min(MAX_ZOOM, Math.max(MIN_ZOOM, Math.min((clientWidth - 32) / width, (clientHeight - 32) / height)));
    this.offset = { x: (clientWidth - width * this.zoom) / 2, y: (clientHeight - height * this.zoom) / 2 };
    this.events.onview(this.zoom);
    this.draw();
  }

  /** @param {number} factor @param {Point} [about] in CSS pixels */
  zoomBy(factor, about = { x: this.canvas.clientWidth / 2, y: this.canvas.clientHeight / 2 }) {
    const zoom = Math.min(MAX_ZOOM, Math.max(MIN_ZOOM, this.zoom * factor));
    const scale = zoom / this.zoom;
    this.offset = { x: about.x - (about.x - this.offset.x) * scale, y: about.y - (about.y - this.offset.y) * scale };
    this.zoom = zoom;
    this.events.onview(zoom);
    this.draw();
  }

  /** @param {MouseEvent} event @returns {Point} in CSS pixels */
  local(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  /** @param {Point} at in CSS pixels @returns {Point} in photo pixels */
  toPhoto(at) {
    return { x: (at.x - this.offset.x) / this.zoom - 0.5, y: (at.y - this.offset.y) / this.zoom - 0.5 };
  }

  paint() {
    const { tool, classId, maskOnly } = /** @type {Settings} */ (this.settings);
    return { id: maskOnly ? null : classId, erase: tool === "eraser" || this.penErases };
  }

  /** @param {PointerEvent} event */
  down(event) {
    if (!this.document || !this.settings) return;
    if (event.pointerType === "touch" && this.pen !== null) return;
    if (event.pointerType === "pen") {
      this.cancelStroke();
      this.pointers.clear();
      this.pen = event.pointerId;
      this.penErases = (event.buttons & 32) !== 0; // the other end of the pen
    }
    this.canvas.focus({ preventScroll: true });
    this.canvas.classList.add("pointed"); // the focus ring is for the keyboard
    this.canvas.setPointerCapture(event.pointerId);
    const local = this.local(event);
    this.pointers.set(event.pointerId, local);
    if (this.pointers.size >= 2) { // a pinch, whose first finger has drawn by mistake
      this.cancelStroke();
      return;
    }
    const at = this.toPhoto(local);
    if (event.button === 1 || event.button === 2 || this.spaceHeld || this.settings.tool === "pan") {
      this.panning = true;
      return;
    }
    if (this.settings.compare && this.document.state.result && Math.abs(local.x - this.dividerX()) < 14) {
      this.drag = null;
      this.movingDivider = true;
      return;
    }
    const { tool, radius } = this.settings;
    if (tool === "brush" || tool === "eraser") {
      const from = event.shiftKey && this.lastEnd ? this.lastEnd : at;
      this.document.begin(this.paint().erase ? "erase" : "stroke");
      this.document.paintStroke(from, at, radius, this.paint());
      this.drag = { from: at, last: at };
    } else if (tool === "rectangle") {
      this.drag = { from: at, last: at };
    } else {
      this.pressed = at;
    }
    this.draw();
  }

  /** The tools that act where the pointer is released.
   * @param {Point} at @param {Tool} tool */
  use(at, tool) {
    if (tool === "polygon") {
      const first = this.points[0];
      if (this.points.length > 2 && Math.hypot(first.x - at.x, first.y - at.y) * this.zoom < 10) this.closePolygon();
      else this.points.push(at);
    } else if (tool === "bucket") {
      this.document?.paintRegion(at, this.paint());
    } else {
      this.pick(at, tool);
    }
    this.draw();
  }

  /** @param {Point} at @param {Tool} tool */
  pick(at, tool) {
    const { width, height, labels } = /** @type {EditDocument} */ (this.document).state;
    const [x, y] = [Math.round(at.x), Math.round(at.y)];
    if (x < 0 || y < 0 || x >= width || y >= height) return;
    const id = labels[y * width + x];
    if (tool === "picker") this.events.onpick(id);
    else this.document?.replaceClass(id, /** @type {Settings} */ (this.settings).classId);
  }

  /** @param {PointerEvent} event */
  move(event) {
    if (!this.document || !this.settings) return;
    if (event.pointerType === "touch" && !this.pointers.has(event.pointerId)) return;
    const local = this.local(event);
    const before = this.pointers.get(event.pointerId);
    if (before) this.pointers.set(event.pointerId, local);
    if (this.pointers.size === 2 && before) {
      this.pinch(event.pointerId, before, local);
      return;
    }
    const at = this.toPhoto(local);
    this.cursor = at;
    this.events.onhover(at);
    if (this.panning && before) {
      this.offset = { x: this.offset.x + local.x - before.x, y: this.offset.y + local.y - before.y };
    } else if (this.movingDivider) {
      this.divider = Math.min(1, Math.max(0, (local.x - this.offset.x) / (this.document.state.width * this.zoom)));
    } else if (this.drag) {
      const { tool, radius } = this.settings;
      if (tool === "brush" || tool === "eraser") {
        const events = event.getCoalescedEvents?.() ?? [];
        for (const one of events.length ? events : [event]) {
          const next = this.toPhoto(this.local(one));
          this.document.paintStroke(this.drag.last, next, radius, this.paint());
          this.drag.last = next;
        }
      }
      this.drag.last = at;
    }
    this.draw();
  }

  /** @param {PointerEvent} event */
  up(event) {
    const known = this.pointers.delete(event.pointerId);
    if (event.pointerId === this.pen) this.pen = null;
    if (!known) return;
    if (this.panning || this.movingDivider) {
      this.panning = this.movingDivider = false;
      return;
    }
    if (!this.document || !this.settings) return;
    const { tool } = this.settings;
    if (this.pressed) {
      const at = this.pressed;
      this.pressed = null;
      this.use(at, tool);
    }
    if (!this.drag) return;
    if (tool === "rectangle") this.document.paintRectangle(this.drag.from, this.drag.last, this.paint());
    else this.document.commit();
    this.lastEnd = this.drag.last;
    if (this.cursor) this.events.onhover(this.cursor); // its class is another now
    this.drag = null;
    this.penErases = false;
    this.draw();
  }

  /** Leaves the polygon or the stroke under way. */
  abandon() {
    this.points = [];
    this.cancelStroke();
  }

  cancelStroke() {
    this.document?.rollback();
    this.drag = null;
    this.pressed = null;
    this.panning = false;
    this.movingDivider = false;
    this.penErases = false;
    this.draw();
  }

  closePolygon() {
    if (this.settings?.tool !== "polygon" || this.points.length < 3) return;
    this.document?.paintPolygon(this.points, this.paint());
    this.points = [];
    this.draw();
  }

  /** @param {number} id @param {Point} before @param {Point} now */
  pinch(id, before, now) {
    const other = [...this.pointers].find(([key]) => key !== id)?.[1];
    if (!other) return;
    const old = Math.hypot(before.x - other.x, before.y - other.y);
    const fresh = Math.hypot(now.x - other.x, now.y - other.y);
    this.offset = { x: this.offset.x + (now.x - before.x) / 2, y: this.offset.y + (now.y - before.y) / 2 };
    this.zoomBy(fresh / Math.max(old, 1), { x: (now.x + other.x) / 2, y: (now.y + other.y) / 2 });
  }

  /** @param {WheelEvent} event */
  wheel(event) {
    event.preventDefault();
    if (event.ctrlKey || !event.shiftKey) this.zoomBy(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), this.local(event));
  }

  /** Moves the keyboard's cursor and keeps it in view. @param {number} dx @param {number} dy in photo pixels */
  moveCursor(dx, dy) {
    if (!this.document) return;
    const { width, height } = this.document.state;
    const from = this.cursor ?? { x: width / 2, y: height / 2 };
    this.cursor = { x: Math.min(width - 1, Math.max(0, from.x + dx)), y: Math.min(height - 1, Math.max(0, from.y + dy)) };
    this.events.onhover(this.cursor);
    this.draw();
  }

  /** Uses the tool at the keyboard's cursor. */
  useAtCursor() {
    const settings = this.settings;
    if (!this.document || !settings || !this.cursor) return;
    if (settings.tool === "bucket") this.document.paintRegion(this.cursor, this.paint());
    else if (settings.tool === "picker" || settings.tool === "replace") this.pick(this.cursor, settings.tool);
    else if (settings.tool === "polygon") this.points.push({ ...this.cursor });
    else {
      this.document.begin("stroke");
      this.document.paintStroke(this.cursor, this.cursor, settings.radius, this.paint());
      this.document.commit();
    }
    this.draw();
  }

  /** @param {number} share of the photo's width */
  moveDivider(share) {
    this.divider = Math.min(1, Math.max(0, this.divider + share));
    this.draw();
  }

  dividerX() {
    return this.offset.x + this.divider * /** @type {EditDocument} */ (this.document).state.width * this.zoom;
  }

  draw() {
    if (this.requested) return;
    this.requested = true;
    requestAnimationFrame(() => {
      this.requested = false;
      this._draw();
    });
  }

  _draw() {
    const { context, canvas, document, settings } = this;
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = getComputedStyle(canvas).getPropertyValue("--canvas").trim() || "#222";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (!document || !settings) return;
    const { state } = document;
    context.setTransform(ratio * this.zoom, 0, 0, ratio * this.zoom, ratio * this.offset.x, ratio * this.offset.y);
    context.imageSmoothingEnabled = this.zoom < 3;
    context.drawImage(state.photo.bitmap, 0, 0);
    const result = state.result;
    if (result && !settings.showOriginal) {
      context.save();
      context.beginPath();
      const left = settings.compare ? this.divider * state.width : 0;
      context.rect(left, 0, state.width - left, state.height);
      context.clip();
      context.drawImage(result.bitmap, 0, 0);
      context.restore();
    } else if (!settings.showOriginal) {
      this._drawOverlay();
    }
    if (settings.showWindows && result) this._drawWindows();
    if (settings.compare && result) this._drawDivider();
    this._drawCursor();
  }

  _drawOverlay() {
    const { context, canvas } = this;
    const document = /** @type {EditDocument} */ (this.document);
    for (const tile of document.dirty) this.overlay.delete(tile);
    document.dirty.clear();
    const topLeft = this.toPhoto({ x: 0, y: 0 });
    const bottomRight = this.toPhoto({ x: canvas.clientWidth, y: canvas.clientHeight });
    const firstColumn = Math.max(0, Math.floor(topLeft.x / TILE));
    const lastColumn = Math.min(document.columns - 1, Math.floor(bottomRight.x / TILE));
    const firstRow = Math.max(0, Math.floor(topLeft.y / TILE));
    const lastRow = Math.min(document.rows - 1, Math.floor(bottomRight.y / TILE));
    let budget = TILES_PER_FRAME;
    context.imageSmoothingEnabled = this.zoom < 1;
    for (let row = firstRow; row <= lastRow; row++) {
      for (let column = firstColumn; column <= lastColumn; column++) {
        const tile = row * document.columns + column;
        if (!this.overlay.has(tile)) {
          if (budget-- <= 0) {
            this.draw(); // the rest in the next frames
            continue;
          }
          this.overlay.set(tile, this._renderTile(tile));
        }
        const image = this.overlay.get(tile);
        if (image) context.drawImage(image, column * TILE, row * TILE);
      }
    }
  }

  /** @param {number} tile */
  _renderTile(tile) {
    const document = /** @type {EditDocument} */ (this.document);
    const settings = /** @type {Settings} */ (this.settings);
    const { width, height, labels, mask, hasLabels } = document.state;
    const { left, top, right, bottom } = document.tileBox(tile);
    const across = right - left;
    const image = new ImageData(across, bottom - top);
    const pixels = new Uint32Array(image.data.buffer);
    const alpha = Math.round(settings.opacity * 255) << 24;
    const faint = Math.round(settings.opacity * 110) << 24;
    const colors = settings.colors.map(([r, g, b]) => (b << 16) | (g << 8) | r);
    let any = false;
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++) {
        const at = y * width + x;
        const masked = mask[at] !== 0;
        if (!masked && !(settings.showLabels && hasLabels)) continue;
        any = true;
        const color = colors[labels[at]] ?? 0xffffff;
        if (!settings.outline) pixels[(y - top) * across + x - left] = color | (masked ? alpha : faint);
        // The edge of the mask, and in outline mode of every class: white inside, black beside it.
        const differs = (/** @type {number} */ other) => mask[other] !== mask[at] || (settings.outline && labels[other] !== labels[at]);
        const edge = (x > 0 && differs(at - 1)) || (x + 1 < width && differs(at + 1)) || (y > 0 && differs(at - width)) || (y + 1 < height && differs(at + width));
        if (edge) pixels[(y - top) * across + x - left] = (x + y) & 4 ? 0xff000000 : 0xffffffff;
      }
    }
    if (!any) return null;
    const canvas = new OffscreenCanvas(across, bottom - top);
    /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d")).putImageData(image, 0, 0);
    return canvas;
  }

  _drawWindows() {
    const { context } = this;
    const { result } = /** @type {EditDocument} */ (this.document).state;
    context.lineWidth = 1 / this.zoom;
    context.strokeStyle = "#ffb000";
    context.setLineDash([6 / this.zoom, 4 / this.zoom]);
    for (const one of result?.tiles ?? []) context.strokeRect(one.left, one.top, one.size, one.size);
    context.setLineDash([]);
    context.lineWidth = 2 / this.zoom;
    for (const one of result?.report.windows ?? []) {
      context.strokeStyle = one.cascade ? "#ffb000" : "#00c2ff";
      context.strokeRect(one.left, one.top, one.width, one.height);
    }
  }

  _drawDivider() {
    const { context } = this;
    const { width, height } = /** @type {EditDocument} */ (this.document).state;
    const x = this.divider * width;
    context.fillStyle = "#fff";
    context.fillRect(x - 1 / this.zoom, 0, 2 / this.zoom, height);
    context.beginPath();
    context.arc(x, height / 2, 12 / this.zoom, 0, 2 * Math.PI);
    context.fill();
    context.fillStyle = "#111";
    context.font = `${14 / this.zoom}px sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText("⇔", x, height / 2);
  }

  _drawCursor() {
    const { context, cursor, settings, drag } = this;
    if (!settings) return;
    context.lineWidth = 1.5 / this.zoom;
    const outline = (/** @type {() => void} */ path) => {
      for (const [color, width] of /** @type {[string, number][]} */ ([["#000", 3], ["#fff", 1.5]])) {
        context.strokeStyle = color;
        context.lineWidth = width / this.zoom;
        context.beginPath();
        path();
        context.stroke();
      }
    };
    if (this.points.length) {
      outline(() => [...this.points, ...(cursor ? [cursor] : [])].forEach((p) => context.lineTo(p.x + 0.5, p.y + 0.5)));
    }
    if (settings.tool === "rectangle" && drag) {
      outline(() => context.rect(drag.from.x + 0.5, drag.from.y + 0.5, drag.last.x - drag.from.x, drag.last.y - drag.from.y));
    }
    if (!cursor) return;
    if (settings.tool === "brush" || settings.tool === "eraser") {
      outline(() => context.arc(cursor.x + 0.5, cursor.y + 0.5, settings.radius, 0, 2 * Math.PI));
    } else {
      const arm = 8 / this.zoom;
      outline(() => {
        context.moveTo(cursor.x + 0.5 - arm, cursor.y + 0.5);
        context.lineTo(cursor.x + 0.5 + arm, cursor.y + 0.5);
        context.moveTo(cursor.x + 0.5, cursor.y + 0.5 - arm);
        context.lineTo(cursor.x + 0.5, cursor.y + 0.5 + arm);
      });
    }
  }
}
