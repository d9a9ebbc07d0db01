// The page: tools, classes, options, runs and history around the canvas.

import { html, render, useCallback, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { ConnectionLost, ServiceError, checkPhoto, fetchModel, fetchSample, fetchSamples, packSession, readLabels, runEdit } from "./api.js";
import { EditDocument } from "./document.js";
import { Surface } from "./surface.js";

/**
 * @typedef {import("./surface.js").Settings} Settings
 * @typedef {import("./surface.js").Tool} Tool
 * @typedef {import("./api.js").Model} Model
 * @typedef {{message: string, hint?: string, kind: "error" | "note" | "done"}} Notice
 */

/** @type {[Tool, string, string, string][]} tool, label, key, icon path */
const TOOLS = [
  ["brush", "Brush", "b", "M4 20c3 0 5-1 5-4l9-9 3 3-9 9c-3 0-5 3-8 1zM15 6l3-3 3 3"],
  ["eraser", "Eraser", "e", "M3 15l9-9 7 7-6 6H8zM8 19h13"],
  ["polygon", "Polygon", "p", "M5 19L3 8l9-5 9 7-4 10z"],
  ["rectangle", "Rectangle", "r", "M4 6h16v12H4z"],
  ["bucket", "Fill a region of the label map", "g", "M5 12l7-7 7 7-7 7zM20 15c1 2 2 3 2 4a2 2 0 01-4 0c0-1 1-2 2-4z"],
  ["replace", "Replace a class everywhere by the chosen one", "x", "M4 8h13l-3-3M20 16H7l3 3"],
  ["picker", "Pick a class", "i", "M4 20l1-4 9-9 3 3-9 9zM13 6l2-2 5 5-2 2"],
  ["pan", "Move the view", "h", "M12 3v18M3 12h18M12 3l-3 3M12 3l3 3M12 21l-3-3M12 21l3-3M3 12l3-3M3 12l3 3M21 12l-3-3M21 12l-3 3"],
];

const SHORTCUTS = [
  ["Enter", "run the edit"], ["Esc", "cancel"], ["Ctrl+Z / Ctrl+Shift+Z", "undo / redo"],
  ["B E P R G X I H", "brush, eraser, polygon, rectangle, fill, replace, pick, move"],
  ["[ ]", "smaller or larger brush"], ["0–9", "choose a class by its number"], ["Shift+click", "straight line from the last stroke"],
  ["Arrows, Space", "move the cursor (Shift: further), use the tool there"], ["Double click / C", "close a polygon"],
  ["hold O", "show the original"], ["A", "compare with a slider"], [", .", "move the slider"], ["L", "show the label map"], ["M", "mask only: keep labels"],
  ["T", "outlines instead of colors"], ["W", "show windows and tiles of the edit"], ["F", "fit to the screen"], ["+ −, wheel", "zoom"],
  ["hold Space and drag", "move the view"], ["?", "this list"],
];

/** @type {Settings} */
const INITIAL = {
  tool: "brush", classId: 0, radius: 14, maskOnly: false, opacity: 0.6, outline: false, showLabels: false,
  showWindows: false, compare: false, showOriginal: false, colors: [],
};

/** @param {Blob} blob @param {string} name */
function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** @param {Blob} blob @param {string} name */
async function openPhoto(blob, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    await checkPhoto(blob, name); // says what is wrong in the words of the command line
    throw new ServiceError(`${name} cannot be shown by this browser`, "save it as PNG or JPEG");
  }
  const facts = await checkPhoto(blob, name);
  if (facts.width !== bitmap.width || facts.height !== bitmap.height) {
    throw new ServiceError(`${name} is read as ${facts.width}×${facts.height}, but shown as ${bitmap.width}×${bitmap.height}`, "save it again without an EXIF orientation");
  }
  return { photo: { blob, name, bitmap }, notes: facts.notes };
}

function App() {
  const [model, setModel] = useState(/** @type {Model | null} */ (null));
  const [samples, setSamples] = useState(/** @type {{name: string, title: string}[]} */ ([]));
  const [settings, setSettings] = useState(INITIAL);
  const [notice, setNotice] = useState(/** @type {Notice | null} */ (null));
  const [progress, setProgress] = useState(/** @type {{done: number, total: number} | null} */ (null));
  const [hover, setHover] = useState("");
  const [zoom, setZoom] = useState(1);
  const [search, setSearch] = useState("");
  const [options, setOptions] = useState({ tiling: "auto", feather: 3, match_surroundings: "auto" });
  const [dialog, setDialog] = useState(/** @type {"" | "shortcuts" | "extend"} */ (""));
  const [offline, setOffline] = useState(false);
  const [, setVersion] = useState(0);
  const doc = useRef(/** @type {EditDocument | null} */ (null));
  const surface = useRef(/** @type {Surface | null} */ (null));
  const canvas = useRef(/** @type {HTMLCanvasElement | null} */ (null));
  const abort = useRef(/** @type {AbortController | null} */ (null));
  const live = useRef({ settings, model, dialog, options });
  live.current = { settings, model, dialog, options };

  const refresh = useCallback(() => {
    setVersion((n) => n + 1);
    surface.current?.draw();
  }, []);
  const change = useCallback((/** @type {Partial<Settings>} */ part) => setSettings((old) => ({ ...old, ...part })), []);
  const report = useCallback((/** @type {unknown} */ error) => {
    if (error instanceof DOMException && error.name === "AbortError") setNotice({ kind: "note", message: "canceled" });
    else if (error instanceof ServiceError) setNotice({ kind: "error", message: error.message, hint: error.hint });
    else setNotice({ kind: "error", message: String(error) });
    if (error instanceof ConnectionLost) setOffline(true);
  }, []);

  // Asks once a second whether the service is back.
  useEffect(() => {
    if (!offline) return undefined;
    const timer = setInterval(async () => {
      try {
        await fetchModel();
      } catch (error) {
        if (error instanceof ConnectionLost) return;
      }
      setOffline(false);
      setNotice({ kind: "note", message: "connected again", hint: doc.current?.masked ? "your work is still here: press Enter to run it" : undefined });
      await start();
    }, 1000);
    return () => clearInterval(timer);
  }, [offline]);

  /** Asks what is served; opens the first sample if no photo is open. */
  const start = async () => {
    try {
      const found = await fetchModel();
      setModel(found);
      change({ colors: found.classes.classes.map((one) => one.color) });
      const listed = await fetchSamples();
      setSamples(listed);
      if (doc.current) return;
      change({ classId: found.classes.classes.find((one) => one.name === "tree")?.id ?? 0 });
      if (listed.length) await openSample(listed[0].name);
    } catch (error) {
      report(error);
    }
  };

  /** @param {import("./document.js").Photo} photo @param {{ids: Uint8Array, width: number, height: number} | null} labels @param {string[]} notes */
  const openDocument = (photo, labels, notes) => {
    doc.current = new EditDocument(photo, labels);
    doc.current.onchange = refresh;
    surface.current?.open(doc.current);
    change({ compare: false, showWindows: false });
    setNotice(notes.length ? { kind: "note", message: notes.join("; ") } : null);
    refresh();
  };

  const openSample = async (/** @type {string} */ name) => {
    try {
      const [blob, map] = await Promise.all([fetchSample(name, "photo"), fetchSample(name, "labels")]);
      const [{ photo, notes }, labels] = await Promise.all([openPhoto(blob, `${name}.jpg`), readLabels(map, "labels.png", false)]);
      openDocument(photo, labels, notes);
    } catch (error) {
      report(error);
    }
  };

  const openFile = async (/** @type {File} */ file) => {
    try {
      const { photo, notes } = await openPhoto(file, file.name);
      openDocument(photo, null, notes);
    } catch (error) {
      report(error);
    }
  };

  const openLabels = async (/** @type {File} */ file) => {
    const { current } = doc;
    if (!current) return;
    try {
      let map;
      try {
        map = await readLabels(file, file.name, false);
      } catch (error) {
        if (!(error instanceof ServiceError) || !error.hint?.includes("labels convert")) throw error;
        map = await readLabels(file, file.name, true); // a map in class colors
      }
      const { width, height } = current.state;
      if (map.width !== width || map.height !== height) {
        throw new ServiceError(`${file.name} is ${map.width}×${map.height} but the photo is ${width}×${height}; they must match`, "open the label map of this photo");
      }
      current.replaceState("open label map", { base: map.ids, labels: map.ids.slice(), hasLabels: true, mask: new Uint8Array(width * height), result: null });
      change({ showLabels: true });
    } catch (error) {
      report(error);
    }
  };

  /** @param {boolean} withFiles */
  const editForm = async (withFiles = true) => {
    const { state } = /** @type {EditDocument} */ (doc.current);
    const form = new FormData();
    form.append("image", state.photo.blob, state.photo.name);
    if (withFiles) {
      form.append("labels", await /** @type {EditDocument} */ (doc.current).labelsBlob(), "labels.png");
      form.append("mask", await /** @type {EditDocument} */ (doc.current).maskBlob(), "mask.png");
    }
    for (const [name, value] of Object.entries(live.current.options)) if (value !== "auto") form.append(name, String(value));
    return form;
  };

  /** @param {FormData} form */
  const send = async (form) => {
    abort.current = new AbortController();
    setNotice(null);
    setProgress({ done: 0, total: 0 });
    try {
      const result = await runEdit(form, (done, total) => setProgress({ done, total }), abort.current.signal);
      return { ...result, bitmap: await createImageBitmap(result.blob) };
    } finally {
      setProgress(null);
      abort.current = null;
    }
  };

  const run = async () => {
    const { current } = doc;
    if (!current || abort.current) return;
    if (!current.masked) {
      setNotice({ kind: "error", message: "nothing is painted yet", hint: "choose a class and paint over what should become it" });
      return;
    }
    const started = performance.now();
    try {
      const result = await send(await editForm());
      current.replaceState("edit", { result });
      const seconds = ((performance.now() - started) / 1000).toFixed(2);
      setNotice({ kind: "done", message: `edited in ${seconds} s`, hint: result.notes.join("; ") || undefined });
      fetchModel().then(setModel, () => {});
    } catch (error) {
      report(error);
    }
  };

  const extend = async (/** @type {number[]} */ sides) => {
    setDialog("");
    const { current } = doc;
    if (!current || abort.current) return;
    try {
      const form = await editForm(false);
      form.append("extend", sides.join(","));
      form.append("fill", String(live.current.settings.classId));
      form.delete("match_surroundings");
      const result = await send(form);
      const size = result.width * result.height;
      current.replaceState("extend", {
        photo: { blob: result.blob, name: current.state.photo.name.replace(/\.\w+$/, "") + ".png", bitmap: result.bitmap },
        width: result.width, height: result.height, base: new Uint8Array(size), labels: new Uint8Array(size),
        mask: new Uint8Array(size), hasLabels: false, result: null,
      });
      surface.current?.open(current);
      setNotice({ kind: "done", message: `extended to ${result.width}×${result.height}` });
    } catch (error) {
      report(error);
    }
  };

  const accept = async () => {
    const { current } = doc;
    if (!current?.state.result) return;
    current.acceptResult(await createImageBitmap(current.state.result.blob));
  };

  const saveSession = async () => {
    try {
      download(await packSession(await editForm()), "session.zip");
    } catch (error) {
      report(error);
    }
  };

  useEffect(() => {
    const view = new Surface(/** @type {HTMLCanvasElement} */ (canvas.current), {
      onhover: (at) => setHover(describe(at)),
      onpick: (id) => change({ classId: id, tool: "brush" }),
      onview: setZoom,
    });
    surface.current = view;
    start();
  }, []);

  /** @param {import("./raster.js").Point | null} at */
  const describe = (at) => {
    const { current } = doc;
    if (!at || !current) return "";
    const { width, height, labels, mask, hasLabels } = current.state;
    const [x, y] = [Math.round(at.x), Math.round(at.y)];
    if (x < 0 || y < 0 || x >= width || y >= height) return "";
    const masked = mask[y * width + x] !== 0;
    const name = live.current.model?.classes.classes[labels[y * width + x]]?.name ?? "void";
    return `${x}, ${y}${masked || hasLabels ? ` · ${name}` : ""}${masked ? " (edited)" : ""}`;
  };

  // What the surface draws follows the settings.
  useEffect(() => {
    if (!surface.current) return;
    surface.current.settings = settings;
    if (settings.tool !== "polygon") surface.current.points = [];
    surface.current.draw();
  }, [settings]);
  useEffect(() => {
    doc.current?.markAllDirty();
    surface.current?.draw();
  }, [settings.opacity, settings.outline, settings.showLabels, settings.colors]);

  useEffect(() => {
    /** @param {KeyboardEvent} event */
    const keydown = (event) => {
      const target = /** @type {HTMLElement} */ (event.target);
      if (target.closest("input, select, textarea") && event.key !== "Escape") return;
      canvas.current?.classList.remove("pointed");
      const { settings: now, dialog: open, model: served } = live.current;
      const key = event.key.toLowerCase();
      const view = surface.current;
      if (key === "escape") {
        if (open) setDialog("");
        else abort.current?.abort();
        view?.abandon();
        return;
      }
      if (open) return;
      const onButton = target.closest("button, a, summary") !== null;
      if (event.ctrlKey || event.metaKey) {
        if (key === "z" && !event.shiftKey) doc.current?.undo();
        else if (key === "z" || key === "y") doc.current?.redo();
        else return;
      } else if (key === "enter" && !onButton) run();
      else if (key === " " && !onButton) {
        if (event.repeat) {
          if (view) view.spaceHeld = true;
        } else view?.useAtCursor();
      } else if (key.startsWith("arrow") && target === canvas.current) {
        const step = event.shiftKey ? 20 : 4;
        view?.moveCursor(key === "arrowleft" ? -step : key === "arrowright" ? step : 0, key === "arrowup" ? -step : key === "arrowdown" ? step : 0);
      } else if (/^\d$/.test(key) && served && Number(key) < served.classes.classes.length) change({ classId: Number(key) });
      else if (key === "[") change({ radius: Math.max(1, Math.round(now.radius / 1.25)) });
      else if (key === "]") change({ radius: Math.min(400, Math.round(now.radius * 1.25) + 1) });
      else if (key === "o") change({ showOriginal: true });
      else if (key === "a") change({ compare: !now.compare });
      else if ((key === "," || key === ".") && now.compare) view?.moveDivider(key === "," ? -0.05 : 0.05);
      else if (key === "l") change({ showLabels: !now.showLabels });
      else if (key === "m") change({ maskOnly: !now.maskOnly });
      else if (key === "t") change({ outline: !now.outline });
      else if (key === "w") change({ showWindows: !now.showWindows });
      else if (key === "f") view?.fit();
      else if (key === "c") view?.closePolygon();
      else if (key === "+" || key === "=") view?.zoomBy(1.25);
      else if (key === "-") view?.zoomBy(0.8);
      else if (key === "?") setDialog("shortcuts");
      else {
        const tool = TOOLS.find(([, , shortcut]) => shortcut === key);
        if (!tool) return;
        change({ tool: tool[0] });
      }
      event.preventDefault();
    };
    /** @param {KeyboardEvent} event */
    const keyup = (event) => {
      if (event.key.toLowerCase() === "o") change({ showOriginal: false });
      if (event.key === " " && surface.current) surface.current.spaceHeld = false;
    };
    /** @param {DragEvent} event */
    const drop = (event) => {
      event.preventDefault();
      const file = event.dataTransfer?.files[0];
      if (file) openFile(file);
    };
    /** @param {ClipboardEvent} event */
    const paste = (event) => {
      const file = [...(event.clipboardData?.files ?? [])][0];
      if (file) openFile(file);
    };
    const over = (/** @type {DragEvent} */ event) => event.preventDefault();
    /** @param {BeforeUnloadEvent} event */
    const leave = (event) => {
      if (doc.current?.undoStack.length) event.preventDefault(); // the browser asks whether to leave the work
    };
    window.addEventListener("keydown", keydown);
    window.addEventListener("keyup", keyup);
    window.addEventListener("drop", drop);
    window.addEventListener("dragover", over);
    window.addEventListener("paste", paste);
    window.addEventListener("beforeunload", leave);
    return () => {
      window.removeEventListener("keydown", keydown);
      window.removeEventListener("keyup", keyup);
      window.removeEventListener("drop", drop);
      window.removeEventListener("dragover", over);
      window.removeEventListener("paste", paste);
      window.removeEventListener("beforeunload", leave);
    };
  }, []);

  const state = doc.current?.state ?? null;
  const classes = model?.classes.classes ?? [];
  const shown = classes.filter((one) => one.name.toLowerCase().includes(search.toLowerCase()) || String(one.id) === search);
  const chosen = classes[settings.classId];

  return html`
    <header>
      <h1>spmdeploy <span>studio</span></h1>
      <label class="button">Open photo<input type="file" accept="image/png,image/jpeg,image/webp,image/bmp" onChange=${(/** @type {any} */ event) => takeFile(event, openFile)} /></label>
      <label class=${`button ${state ? "" : "disabled"}`}>Label map<input type="file" accept="image/png" disabled=${!state} onChange=${(/** @type {any} */ event) => takeFile(event, openLabels)} /></label>
      <select aria-label="Open a sample" value="" onChange=${(/** @type {any} */ event) => openSample(event.target.value)}>
        <option value="" disabled>Samples</option>
        ${samples.map((one) => html`<option value=${one.name}>${one.title}</option>`)}
      </select>
      <span class="spacer"></span>
      ${model && html`<${Badge} model=${model} offline=${offline} />`}
      <button onClick=${() => setDialog("shortcuts")} aria-label="Keyboard shortcuts">?</button>
    </header>
    <nav aria-label="Tools">
      ${TOOLS.map(([tool, label, key, path]) => html`
        <button class="tool" aria-label=${label} aria-pressed=${settings.tool === tool} title=${`${label} (${key.toUpperCase()})`} onClick=${() => change({ tool })}>
          <svg viewBox="0 0 24 24" aria-hidden="true"><path d=${path} /></svg>
        </button>`)}
      <hr />
      <button class="tool" aria-label="Undo" title=${historyTitle("Undo", doc.current?.undoStack.at(-1), "Ctrl+Z")} disabled=${!doc.current?.undoStack.length} onClick=${() => doc.current?.undo()}>
        <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M9 5L4 10l5 5M4 10h10a6 6 0 010 12h-3" /></svg>
      </button>
      <button class="tool" aria-label="Redo" title=${historyTitle("Redo", doc.current?.redoStack.at(-1), "Ctrl+Shift+Z")} disabled=${!doc.current?.redoStack.length} onClick=${() => doc.current?.redo()}>
        <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M15 5l5 5-5 5M20 10H10a6 6 0 000 12h3" /></svg>
      </button>
    </nav>
    <main>
      <canvas ref=${canvas} tabindex="0" role="img" aria-label=${state ? `${state.photo.name}, ${state.width} by ${state.height} pixels, ${doc.current?.masked ?? 0} pixels painted. Arrow keys move the cursor, Space paints.` : "No photo is open"}></canvas>
      ${state?.result && html`<div class="compare" role="group" aria-label="Result">
        <button aria-pressed=${settings.compare} onClick=${() => change({ compare: !settings.compare })}>Compare</button>
        <button onClick=${accept}>Use as new photo</button>
        <button onClick=${() => doc.current?.undo()}>Back to painting</button>
      </div>`}
      ${progress && html`<div class="progress" role="status">
        <progress aria-label="Edit" value=${progress.done} max=${progress.total || 1}></progress>
        <span>${progress.total > 1 ? `${progress.done} of ${progress.total}` : "editing …"}</span>
        <button onClick=${() => abort.current?.abort()}>Cancel</button>
      </div>`}
      ${notice && html`<div class=${`notice ${notice.kind}`} role=${notice.kind === "error" ? "alert" : "status"}>
        <p>${notice.message}${notice.hint && html`<br /><small>${notice.hint}</small>`}</p>
        <button aria-label="Dismiss" onClick=${() => setNotice(null)}>×</button>
      </div>`}
    </main>
    <aside aria-label="Classes and options">
      <button class="run" disabled=${!state || progress !== null} onClick=${run}>Run <kbd>Enter</kbd></button>
      <section>
        <h2>Paint as</h2>
        <input type="search" placeholder="Search classes" aria-label="Search classes" value=${search} onInput=${(/** @type {any} */ event) => setSearch(event.target.value)} />
        <div class="classes" role="radiogroup" aria-label="Class">
          ${shown.map((one) => html`
            <button role="radio" aria-checked=${one.id === settings.classId} onClick=${() => change({ classId: one.id })}>
              <i style=${{ background: `rgb(${one.color.join(",")})` }}></i><span>${one.name.replace(/_/g, " ")}</span><kbd>${one.id}</kbd>
            </button>`)}
        </div>
        <label class="check"><input type="checkbox" checked=${settings.maskOnly} onChange=${() => change({ maskOnly: !settings.maskOnly })} /> Mask only: keep the label map's classes</label>
      </section>
      <section>
        <h2>Brush and view</h2>
        <${Slider} label="Brush" unit="px" min=${1} max=${200} value=${settings.radius} onInput=${(/** @type {number} */ radius) => change({ radius })} />
        <${Slider} label="Overlay" unit="%" min=${10} max=${100} value=${Math.round(settings.opacity * 100)} onInput=${(/** @type {number} */ value) => change({ opacity: value / 100 })} />
        <label class="check"><input type="checkbox" checked=${settings.outline} onChange=${() => change({ outline: !settings.outline })} /> Outlines instead of colors</label>
        <label class="check"><input type="checkbox" checked=${settings.showLabels} disabled=${!state?.hasLabels} onChange=${() => change({ showLabels: !settings.showLabels })} /> Show the label map</label>
        <label class="check"><input type="checkbox" checked=${settings.showWindows} disabled=${!state?.result} onChange=${() => change({ showWindows: !settings.showWindows })} /> Show windows and tiles of the edit</label>
        <div class="row">
          <button disabled=${!doc.current?.masked} onClick=${() => doc.current?.growMask(4, settings.maskOnly ? null : settings.classId)}>Grow</button>
          <button disabled=${!doc.current?.masked} onClick=${() => doc.current?.growMask(-4, null)}>Shrink</button>
          <button disabled=${!doc.current?.masked} onClick=${() => doc.current?.clearMask()}>Clear</button>
        </div>
      </section>
      <section>
        <h2>Edit</h2>
        <label class="field">Tiling
          <select value=${options.tiling} onChange=${(/** @type {any} */ event) => setOptions({ ...options, tiling: event.target.value })}>
            <option value="auto">automatic</option><option value="crop">crop</option><option value="cascade">coarse to fine</option>
          </select>
        </label>
        <${Slider} label="Feather" unit="px" min=${0} max=${32} value=${options.feather} onInput=${(/** @type {number} */ feather) => setOptions({ ...options, feather })} />
        <label class="field" title="Matches colors and grain of the edit to known pixels of the same classes">Match surroundings
          <select value=${options.match_surroundings} onChange=${(/** @type {any} */ event) => setOptions({ ...options, match_surroundings: event.target.value })}>
            <option value="auto">automatic</option><option value="true">always</option><option value="false">never</option>
          </select>
        </label>
        <button disabled=${!state} onClick=${() => setDialog("extend")}>Extend the photo …</button>
      </section>
      <section>
        <h2>Download</h2>
        <div class="row wrap">
          <button disabled=${!state?.result && !state} onClick=${() => state && download(state.result?.blob ?? state.photo.blob, state.result ? "edited.png" : state.photo.name)}>Image</button>
          <button disabled=${!state} onClick=${async () => doc.current && download(await doc.current.labelsBlob(), "labels.png")}>Labels</button>
          <button disabled=${!state} onClick=${async () => doc.current && download(await doc.current.maskBlob(), "mask.png")}>Mask</button>
          <button disabled=${!doc.current?.masked} onClick=${saveSession}>Session</button>
        </div>
      </section>
    </aside>
    <footer>
      <span>${state ? `${state.width}×${state.height}` : ""}</span><span>${Math.round(zoom * 100)} %</span><span>${hover}</span>
      <span class="spacer"></span>
      <span>${doc.current?.masked ? `${doc.current.masked} pixels painted` : `paint with “${chosen?.name ?? ""}”, then press Enter`}</span>
      <a href="/docs">API</a>
    </footer>
    ${dialog === "shortcuts" && html`<${Dialog} title="Keyboard shortcuts" onClose=${() => setDialog("")}>
      <dl>${SHORTCUTS.map(([keys, what]) => html`<dt><kbd>${keys}</kbd></dt><dd>${what}</dd>`)}</dl>
    <//>`}
    ${dialog === "extend" && html`<${Dialog} title="Extend the photo" onClose=${() => setDialog("")}>
      <${ExtendForm} name=${chosen?.name ?? ""} onExtend=${extend} />
    <//>`}
  `;
}

/** @param {any} event @param {(file: File) => void} open */
function takeFile(event, open) {
  const file = event.target.files[0];
  event.target.value = "";
  if (file) open(file);
}

/** @param {string} action @param {import("./document.js").Change | undefined} change @param {string} key */
function historyTitle(action, change, key) {
  return `${action}${change ? `: ${change.label}` : ""} (${key})`;
}

/** @param {{model: Model, offline: boolean}} props */
function Badge({ model, offline }) {
  if (offline) return html`<span class="badge slow" role="status"><span>not connected</span></span>`;
  const slow = model.notes.length > 0;
  const time = model.last_milliseconds === null ? "" : ` · ${Math.round(model.last_milliseconds)} ms`;
  return html`<details class=${`badge ${slow ? "slow" : ""}`}>
    <summary>${model.backend} · ${model.device} · ${model.precision}${time}</summary>
    <div>
      <p><b>${model.name}</b> on ${model.provider}</p>
      ${model.choices.map((line) => html`<p>${line}</p>`)}
      ${model.notes.map((line) => html`<p class="warning">${line}</p>`)}
      <p>License of the weights: ${model.license}</p>
    </div>
  </details>`;
}

/** @param {{label: string, unit: string, min: number, max: number, value: number, onInput: (value: number) => void}} props */
function Slider({ label, unit, min, max, value, onInput }) {
  return html`<label class="field">${label} <span>${value} ${unit}</span>
    <input type="range" min=${min} max=${max} value=${Math.min(max, value)} onInput=${(/** @type {any} */ event) => onInput(Number(event.target.value))} />
  </label>`;
}

/** @param {{title: string, onClose: () => void, children?: unknown}} props */
function Dialog({ title, onClose, children }) {
  const element = useRef(/** @type {HTMLDialogElement | null} */ (null));
  useEffect(() => {
    element.current?.showModal();
  }, []);
  return html`<dialog ref=${element} aria-label=${title} onClose=${onClose}>
    <div class="title"><h2>${title}</h2><button aria-label="Close" onClick=${onClose}>×</button></div>
    ${children}
  </dialog>`;
}

/** @param {{name: string, onExtend: (sides: number[]) => void}} props */
function ExtendForm({ name, onExtend }) {
  const [sides, setSides] = useState([0, 0, 120, 0]);
  return html`<form onSubmit=${(/** @type {Event} */ event) => {
    event.preventDefault();
    if (sides.some((side) => side > 0)) onExtend(sides);
  }}>
    <p>New pixels show the class <b>${name}</b>.</p>
    <div class="sides">
      ${["Left", "Top", "Right", "Bottom"].map((side, index) => html`<label class="field">${side}
        <input type="number" min="0" max="4096" value=${sides[index]} onInput=${(/** @type {any} */ event) => setSides(sides.map((old, k) => (k === index ? Number(event.target.value) : old)))} />
      </label>`)}
    </div>
    <button class="run" type="submit">Extend</button>
  </form>`;
}

const root = /** @type {Element} */ (document.getElementById("app"));
root.replaceChildren();
render(html`<${App} />`, root);
