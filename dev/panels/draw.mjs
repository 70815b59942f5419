// Draws the dashboard's panels with Grafana's own UI library in headless Chromium, from what a Prometheus answered:
//
//   node dev/panels/draw.mjs [FOLDER]     FOLDER: files of tests/observability; build/observability
//
// Writes to FOLDER: panels/NN-title.png and panels/NN-title-light.png for every panel, panels/pictures.md and .json
// (what drew each of them and what it reads), dashboard-{dark,light}.png, overview-dark.png (rows Now and Where energy
// goes) and trust-dark.png (Trust and Grid). Ends with 1 and one line for each panel that could not be drawn.
//
// Needs Node 20, npm and Chromium (apt install nodejs npm chromium; LLMCO2_CHROMIUM names another). The first run
// installs the packages of package.json into .cache/panels, 500 MB.
//
// What this shows: the queries' answers through Grafana's formatting, transformation and drawing code. It shows neither
// Grafana's import of the dashboard nor its variables; the deprecated TimeSeries and Table of @grafana/ui stand for
// those of Grafana's own panels, and heatmaps and state timelines, which are in no package, are sketches of ours.

import { spawnSync } from "node:child_process";
import fs from "node:fs";
import http from "node:http";
import { createRequire } from "node:module";
import path from "node:path";
import { fileURLToPath } from "node:url";

import { heatmapRows, number, rangeOf } from "./frames.mjs";

const HERE = path.dirname(fileURLToPath(import.meta.url));
const ROOT = path.resolve(HERE, "../..");
const CACHE = path.join(ROOT, ".cache", "panels");
const MODULES = path.join(CACHE, "node_modules");
const DASHBOARD = path.join(ROOT, "llmco2_vllm/dashboards/generated/grafana/vllm_energy.json");
const WIDTH = 1600;
const SHEETS = { "overview-dark": ["Now", "Where energy goes"], "trust-dark": ["Trust", "Grid"] };
const MILLISECONDS = 60_000;
const DRAWN_BY = {
  stat: "BigValue of @grafana/ui",
  timeseries: "TimeSeries of @grafana/ui",
  bargauge: "BarGauge of @grafana/ui",
  table: "Table of @grafana/ui",
  heatmap: "sketch of ours; buckets checked",
  "state-timeline": "sketch of ours; texts and colours by @grafana/data",
};
const INKED = new Set(["timeseries", "heatmap", "state-timeline"]);
const FONTS = { "Inter-Regular": 400, "Inter-Medium": 500 };

class Refusal extends Error {}

// Installs the packages, unless those that are asked for are there.
function install() {
  const stamp = path.join(CACHE, "installed");
  const asked = ["package.json", ".npmrc"].map((name) => fs.readFileSync(path.join(HERE, name), "utf8")).join("");
  if (fs.existsSync(stamp) && fs.readFileSync(stamp, "utf8") === asked) return;
  fs.rmSync(MODULES, { recursive: true, force: true });
  fs.mkdirSync(CACHE, { recursive: true });
  for (const name of ["package.json", ".npmrc"]) fs.copyFileSync(path.join(HERE, name), path.join(CACHE, name));
  const answer = spawnSync("npm", ["install", "--no-progress"], { cwd: CACHE, encoding: "utf8" });
  if (answer.error || answer.status) {
    const said = answer.error?.message ?? answer.stderr.split("\n").find((line) => /npm (error|ERR!)/.test(line));
    throw new Refusal(`npm install: ${said ?? "failed"}`);
  }
  fs.writeFileSync(stamp, asked);
}

function chromium() {
  const named = process.env.LLMCO2_CHROMIUM;
  const places = named ? [named] : (process.env.PATH ?? "").split(":").map((place) => path.join(place, "chromium"));
  const found = places.find((place) => fs.existsSync(place));
  if (found) return found;
  const why = named ? `${named} is not there` : "neither LLMCO2_CHROMIUM nor a command chromium (apt install chromium)";
  throw new Refusal(`no Chromium: ${why}`);
}

function read(folder) {
  const names = fs.existsSync(folder) ? fs.readdirSync(folder).filter((name) => /^\d+-.*\.json$/.test(name)) : [];
  if (!names.length) throw new Refusal(`${folder}: no answers of panels; run make observability`);
  const panels = names.sort().map((name) => {
    const panel = JSON.parse(fs.readFileSync(path.join(folder, name), "utf8"));
    return { ...panel, file: name.slice(0, -".json".length) };
  });
  const tops = JSON.parse(fs.readFileSync(DASHBOARD, "utf8")).panels.filter(({ type }) => type === "row");
  const rows = tops.map(({ title, gridPos }, place) => {
    const below = tops[place + 1]?.gridPos.y ?? Infinity;
    return { title, panels: panels.filter(({ gridPos: { y } }) => y > gridPos.y && y < below) };
  });
  return { rows: rows.filter((row) => row.panels.length), range: rangeOf(panels) };
}

// @grafana/ui takes a default export that this package has only as CommonJS, which esbuild hands over unopened.
const scrollbars = (require) => ({
  name: "scrollbars",
  setup(build) {
    const real = JSON.stringify(require.resolve("react-custom-scrollbars-2"));
    build.onResolve({ filter: /^react-custom-scrollbars-2$/ }, ({ path }) => ({ path, namespace: "scrollbars" }));
    build.onLoad({ filter: /.*/, namespace: "scrollbars" }, () => ({
      contents: `export { Scrollbars as default } from ${real};`,
      resolveDir: MODULES,
    }));
  },
});

async function bundle(require) {
  const built = await require("esbuild").build({
    entryPoints: [path.join(HERE, "page.jsx")],
    bundle: true,
    write: false,
    minify: true,
    jsx: "automatic",
    nodePaths: [MODULES],
    plugins: [scrollbars(require)],
    outdir: CACHE,
    define: { "process.env.NODE_ENV": '"production"' },
    loader: Object.fromEntries([".ttf", ".woff", ".woff2", ".svg"].map((suffix) => [suffix, "dataurl"])),
    logLevel: "error",
  });
  const text = (suffix) => built.outputFiles.find((file) => file.path.endsWith(suffix))?.text ?? "";
  return { "/page.js": ["text/javascript", text(".js")], "/page.css": ["text/css", text(".css")] };
}

// The page, its script, and what @grafana/ui asks its server for: icons, and Inter, the font of Grafana.
function serve(built) {
  const faces = Object.entries(FONTS).map(
    ([name, weight]) =>
      `@font-face { font-family: Inter; font-weight: ${weight}; src: url(/public/fonts/inter/${name}.woff2); }`,
  );
  const page = `<!doctype html><html lang="en"><meta charset="utf-8"><link rel="stylesheet" href="/page.css">
    <style>${faces.join(" ")}</style>
    <script>window.__grafana_public_path__ = "/public/"</script>
    <div id="root"></div><script src="/page.js"></script>`;
  const texts = { "/": ["text/html", page], ...built };
  for (const [name, weight] of Object.entries(FONTS)) {
    const font = path.join(MODULES, "@fontsource/inter/files", `inter-latin-${weight}-normal.woff2`);
    texts[`/public/fonts/inter/${name}.woff2`] = ["font/woff2", fs.readFileSync(font)];
  }
  const icons = path.join(MODULES, "@grafana/ui/dist/public/img/icons");
  const server = http.createServer((request, response) => {
    const wanted = new URL(request.url, "http://localhost").pathname;
    const icon = path.join(icons, wanted.split("/icons/")[1] ?? "");
    const isIcon = wanted.endsWith(".svg") && icon.startsWith(icons) && fs.existsSync(icon);
    const [type, body] = texts[wanted] ?? (isIcon ? ["image/svg+xml", fs.readFileSync(icon)] : []);
    response.writeHead(body === undefined ? 404 : 200, { "content-type": `${type ?? "text/plain"}; charset=utf-8` });
    response.end(body);
  });
  return new Promise((resolve) => server.listen(0, "127.0.0.1", () => resolve(server)));
}

// A page with the rows drawn and at rest.
async function drawn(browser, url, { rows, range }, mode) {
  const page = await browser.newPage();
  const errors = [];
  page.on("pageerror", (error) => errors.push({ panel: "page", error: String(error.stack ?? error) }));
  await page.setViewport({ width: WIDTH, height: 900 });
  await page.goto(url, { waitUntil: "load" });
  await page.evaluate((asked) => window.draw(asked), { rows, range, mode, width: WIDTH });
  const height = await page.evaluate(() => document.getElementById("root").offsetHeight);
  await page.setViewport({ width: WIDTH, height });
  await page.waitForNetworkIdle({ idleTime: 300, timeout: MILLISECONDS });
  await page.evaluate(() => document.fonts.ready.then(() => new Promise((done) => setTimeout(done, 500))));
  const failed = [...errors, ...(await page.evaluate(() => window.failed))];
  return { page, failed, height };
}

// What panels read outside their canvas, where they lie, and how much of them is drawn in colour: pixels, or marks.
const seen = (page) =>
  page.$$eval("[data-panel]", (all) => {
    const coloured = (canvas) => {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      let found = 0;
      for (let at = 0; at < data.length; at += 4) {
        const [red, green, blue, alpha] = data.subarray(at, at + 4);
        if (alpha > 30 && Math.max(red, green, blue) - Math.min(red, green, blue) > 30) found += 1;
      }
      return found;
    };
    return all.map((one) => {
      const { x, y, width, height } = one.getBoundingClientRect();
      const canvases = [...one.querySelectorAll("canvas")].filter((canvas) => canvas.width && canvas.height);
      const ink = canvases.reduce((sum, canvas) => sum + coloured(canvas), one.querySelectorAll("svg rect").length);
      const reads = one.innerText.split("\n").filter(Boolean);
      return { file: one.dataset.panel, reads, ink, clip: { x, y, width, height } };
    });
  });

const count = (panel) => panel.results.reduce((sum, answer) => sum + answer.result.length, 0);

const finite = (panel) => {
  const series = panel.results.flatMap(({ result }) => result);
  return series.some((one) => (one.values ?? [one.value]).some(([, text]) => Number.isFinite(number(text))));
};

// What is wrong with a panel's frames, or with what came of them.
function problemsOf(panel, ink) {
  const found = panel.type === "heatmap" ? heatmapRows(panel).problems : [];
  return INKED.has(panel.type) && finite(panel) && !ink ? [...found, "has values, and nothing is drawn"] : found;
}

// Keeps the list of pictures. Returns the problems.
function list(folder, panels, found) {
  const by = new Map(found.map((one) => [one.file, one]));
  const rows = panels.map((panel) => {
    const { reads, ink } = by.get(panel.file);
    const { file, type, title } = panel;
    const problems = problemsOf(panel, ink);
    return { file, type, title, drawn_by: DRAWN_BY[type], series: count(panel), problems, reads, ink };
  });
  const lines = rows.map((row) => {
    const cells = [`${row.file}.png`, row.type, row.drawn_by, row.series, row.problems.join("; ")];
    return `| ${cells.join(" | ")} |`;
  });
  const head = "| picture | kind | drawn by | series | problems |\n| --- | --- | --- | --- | --- |\n";
  fs.writeFileSync(path.join(folder, "pictures.md"), `${head}${lines.join("\n")}\n`);
  fs.writeFileSync(path.join(folder, "pictures.json"), `${JSON.stringify(rows, null, 1)}\n`);
  return rows.flatMap(({ title, problems }) => problems.map((error) => ({ panel: title, error })));
}

async function photograph(browser, url, folder) {
  const told = read(folder);
  const out = path.join(folder, "panels");
  fs.rmSync(out, { recursive: true, force: true });
  fs.mkdirSync(out, { recursive: true });
  const failed = [];
  for (const mode of ["dark", "light"]) {
    const whole = await drawn(browser, url, told, mode);
    failed.push(...whole.failed);
    await whole.page.screenshot({ path: path.join(folder, `dashboard-${mode}.png`) });
    const found = await seen(whole.page);
    for (const { file, clip } of found) {
      await whole.page.screenshot({ path: path.join(out, `${file}${mode === "light" ? "-light" : ""}.png`), clip });
    }
    if (mode === "dark") failed.push(...list(out, told.rows.flatMap((row) => row.panels), found));
    await whole.page.close();
  }
  for (const [name, titles] of Object.entries(SHEETS)) {
    const rows = titles.flatMap((title) => told.rows.filter((row) => row.title === title));
    if (!rows.length) continue;
    const sheet = await drawn(browser, url, { ...told, rows }, "dark");
    await sheet.page.screenshot({ path: path.join(folder, `${name}.png`) });
    await sheet.page.close();
  }
  const panels = told.rows.flatMap((row) => row.panels);
  console.log(`${path.relative(ROOT, out)}: ${panels.length} panels, ${failed.length} failed`);
  return failed;
}

async function main(folder) {
  const program = chromium();
  install();
  const require = createRequire(path.join(CACHE, "package.json"));
  const server = await serve(await bundle(require));
  const browser = await require("puppeteer-core").launch({
    executablePath: program,
    headless: "shell",
    args: ["--no-sandbox", "--disable-gpu", "--lang=en-US", "--force-color-profile=srgb", "--hide-scrollbars"],
    env: { ...process.env, LANG: "en_US.UTF-8", LC_ALL: "en_US.UTF-8", LANGUAGE: "en-US" },
    protocolTimeout: MILLISECONDS,
  });
  try {
    const failed = await photograph(browser, `http://127.0.0.1:${server.address().port}/`, folder);
    for (const { panel, error } of failed) console.error(`${panel}: ${error.split("\n")[0]}`);
    process.exitCode = failed.length ? 1 : 0;
  } finally {
    await browser.close();
    server.close();
  }
}

try {
  await main(path.resolve(process.argv[2] ?? path.join(ROOT, "build/observability")));
} catch (error) {
  if (!(error instanceof Refusal)) throw error;
  console.error(`panels: ${error.message}`);
  process.exitCode = 1;
}
