// The page that draw.mjs photographs: panels in Grafana's frame, drawn by Grafana's code from the frames of frames.mjs.
//
// stat, timeseries, bargauge and table are drawn by @grafana/ui with the field options, units, reducers and
// transformations of @grafana/data. Heatmap and state timeline belong to Grafana's server and are in no package: their
// frames are checked, and a sketch of ours stands in, which says so on its panel.

import * as D from "@grafana/data";
import * as UI from "@grafana/ui";
import * as schemes from "d3-scale-chromatic";
import React from "react";
import { createRoot } from "react-dom/client";
import { firstValueFrom } from "rxjs";

import { heatmapRows, seriesFrames, stretches, tableFrames } from "./frames.mjs";

const ZONE = "utc";
const CELL = { height: 30, gap: 8 };
const COLUMNS = 24;
// What Grafana's own panel plugins start from; outside of it nothing sets these.
const CUSTOM = {
  timeseries: { drawStyle: "line", lineInterpolation: "linear", lineWidth: 1, fillOpacity: 0, spanNulls: false },
  table: { align: "auto", cellOptions: { type: "auto" }, inspect: false },
};
const STANDARD = "displayName unit min max decimals noValue color thresholds mappings links filterable fieldMinMax";

const option = (id, path, isCustom) => ({
  id,
  path,
  isCustom,
  name: id,
  description: "",
  editor: () => null,
  override: () => null,
  process: D.identityOverrideProcessor,
  shouldApply: () => true,
  settings: {},
});
const standard = STANDARD.split(" ").map((id) => option(id, id, false));
D.standardFieldConfigEditorRegistry.setInit(() => standard);
// One of them is exported under two names.
D.standardTransformersRegistry.setInit(() =>
  [...new Set(Object.values(D.standardTransformers))].map((one) => ({ ...one, transformation: async () => one })),
);

// JSON has no -Infinity: the lowest step has null, which Grafana replaces as it reads a dashboard.
const restored = ({ thresholds, ...defaults }) => {
  const steps = thresholds?.steps.map((step) => ({ ...step, value: step.value ?? -Infinity }));
  return thresholds ? { ...defaults, thresholds: { ...thresholds, steps } } : defaults;
};

// Units, colours, thresholds, mappings and overrides of a panel, on its frames.
function configured(panel, frames, theme) {
  const { defaults, overrides } = panel.fieldConfig;
  const custom = { ...CUSTOM[panel.type], ...defaults.custom };
  const given = overrides.flatMap((rule) => rule.properties.map(({ id }) => id));
  const ours = given.filter((id) => id.startsWith("custom.")).map((id) => id.slice("custom.".length));
  const names = new Set([...Object.keys(custom), ...ours]);
  const registry = new D.FieldConfigOptionsRegistry(() => [
    ...standard,
    ...[...names].map((name) => option(`custom.${name}`, name, true)),
  ]);
  return D.applyFieldOverrides({
    data: frames.map((frame) => D.toDataFrame(frame)),
    fieldConfig: { defaults: { ...restored(defaults), custom }, overrides },
    fieldConfigRegistry: registry,
    replaceVariables: (text) => text,
    theme,
    timeZone: ZONE,
  });
}

async function framesOf(panel, step, theme) {
  if (panel.type !== "table") return configured(panel, seriesFrames(panel, step), theme);
  const frames = tableFrames(panel).map((frame) => D.toDataFrame(frame));
  const context = { interpolate: (text) => text };
  const transformed = D.transformDataFrame(panel.transformations ?? [], frames, context);
  return configured(panel, await firstValueFrom(transformed), theme);
}

// As PanelDataErrorView: what a panel without any series reads.
const Nothing = ({ panel }) => <div className="nothing">{panel.fieldConfig.defaults.noValue ?? "No data"}</div>;

function displayed({ panel, frames, theme, range }, sparkline) {
  const { reduceOptions } = panel.options;
  const { fieldConfig } = panel;
  const replaceVariables = (text) => text;
  const found = D.getFieldDisplayValues({
    ...{ data: frames, fieldConfig, reduceOptions, replaceVariables, sparkline, theme, timeZone: ZONE },
  });
  return found.map((one) => (one.sparkline ? { ...one, sparkline: { ...one.sparkline, timeRange: range } } : one));
}

function Stat(props) {
  const { panel, theme, width, height } = props;
  const { colorMode, graphMode, justifyMode, textMode, orientation } = panel.options;
  const tile = ({ value, width, height, alignmentFactors, count }) => (
    <UI.BigValue
      {...{ colorMode, graphMode, justifyMode, textMode, alignmentFactors, count, theme, width, height }}
      value={value.display}
      sparkline={value.sparkline}
    />
  );
  return (
    <UI.VizRepeater
      {...{ width, height, orientation, source: panel, renderCounter: 0, autoGrid: true }}
      getValues={() => displayed(props, graphMode !== "none")}
      getAlignmentFactors={D.getDisplayValueAlignmentFactors}
      renderValue={tile}
    />
  );
}

function Bars(props) {
  const { panel, theme, width, height } = props;
  const { displayMode, namePlacement, orientation, showUnfilled, text, valueMode } = panel.options;
  const bar = ({ value: { display, field, view, colIndex }, width, height, alignmentFactors, orientation, count }) => (
    <UI.BarGauge
      {...{ alignmentFactors, displayMode, field, height, namePlacement, orientation, showUnfilled, text, theme, width }}
      value={display}
      display={view?.getFieldDisplayProcessor(colIndex ?? 0)}
      itemSpacing={10}
      lcdCellWidth={12}
      isOverflow={false}
      valueDisplayMode={valueMode ?? (count === 1 ? "hidden" : undefined)}
    />
  );
  return (
    <UI.VizRepeater
      {...{ width, height, orientation, source: panel, renderCounter: 0, itemSpacing: 10 }}
      {...{ minVizWidth: 8, minVizHeight: 16, maxVizHeight: 300 }}
      getValues={() => displayed(props, false)}
      getAlignmentFactors={D.getDisplayValueAlignmentFactors}
      renderValue={bar}
    />
  );
}

// As Grafana's panel prepares them: what is not finite is a gap.
const graphable = (frame) => ({
  ...frame,
  fields: frame.fields.map((field) => {
    if (field.type !== "number") return field;
    return { ...field, values: field.values.map((one) => (Number.isFinite(one) ? one : null)) };
  }),
});

const Lines = ({ panel, frames, range, width, height }) => (
  <UI.TimeSeries
    {...{ width, height, timeRange: range, timeZone: ZONE, structureRev: 1 }}
    frames={frames.map(graphable)}
    legend={panel.options.legend}
    options={panel.options}
  />
);

const Rows = ({ panel, frames, range, width, height }) => (
  <UI.Table
    {...{ width, height, timeRange: range, data: frames[0] }}
    cellHeight={panel.options.cellHeight}
    noHeader={!panel.options.showHeader}
  />
);

const clock = (at) => D.dateTimeFormat(at, { format: "HH:mm:ss", timeZone: ZONE });

// A sketch's ground: rows of equal height with names at the left and times below. mark(row): children of a row.
function Sketch({ names, span, width, height, left, theme, mark }) {
  const tall = (height - 22) / names.length;
  const place = (at) => left + ((at - span.begin) / (span.end - span.begin)) * (width - left - 8);
  const many = Math.max(1, Math.min(5, Math.floor((width - left) / 64)));
  const ticks = Array.from({ length: many }, (_, i) => span.begin + ((i + 0.5) / many) * (span.end - span.begin));
  const every = Math.ceil(16 / tall);
  const text = { fill: theme.colors.text.primary, fontSize: 12, fontFamily: theme.typography.fontFamily };
  return (
    <svg width={width} height={height}>
      {names.map((name, row) => (
        <g key={row} transform={`translate(0 ${row * tall})`}>
          {row % every === 0 && (
            <text {...text} x={left - 6} y={tall / 2} textAnchor="end" dominantBaseline="central">
              {name}
            </text>
          )}
          {mark(row, tall, place)}
        </g>
      ))}
      {ticks.map((at) => (
        <text {...text} key={at} x={place(at)} y={height - 6} textAnchor="middle">
          {clock(at)}
        </text>
      ))}
    </svg>
  );
}

function Heatmap({ panel, theme, span, width, height }) {
  const { times, bounds, counts } = heatmapRows(panel);
  const { color, filterValues, yAxis } = panel.options;
  const most = Math.max(...counts.flat().filter(Number.isFinite));
  const format = D.getValueFormat(yAxis.unit);
  const named = (bound) => (Number.isFinite(bound) ? `≤ ${D.formattedValueToString(format(bound))}` : "more");
  const names = bounds.map(named);
  const scheme = schemes[`interpolate${color.scheme}`];
  const shade = (count) => {
    const part = (count / most) ** color.exponent;
    return scheme(theme.isDark ? 1 - part : part);
  };
  const mark = (row, tall, place) =>
    times.map((at, column) => {
      const count = counts.at(-1 - row)[column];
      if (!(count > (filterValues?.le ?? 0))) return null;
      const wide = place(at + span.step) - place(at);
      return <rect key={at} x={place(at)} y={0} width={wide - 1} height={tall - 1} fill={shade(count)} />;
    });
  return <Sketch {...{ theme, span, width, height, mark, left: 64 }} names={names.reverse()} />;
}

function States({ panel, frames, theme, span, width, height }) {
  const fields = frames.map((frame) => ({ times: frame.fields[0].values, field: frame.fields[1] }));
  const names = frames.map((frame) => D.getFieldDisplayName(frame.fields[1], frame, frames));
  const seen = new Map();
  const rows = fields.map(({ times, field }) =>
    stretches(times, field.values, span.step).map((one) => {
      const { text, color } = field.display(one.value);
      seen.set(text, color);
      return { ...one, color };
    }),
  );
  const mark = (row, tall, place) =>
    rows[row].map(({ begin, end, color }) => {
      const wide = Math.min(place(end), width - 8) - place(begin);
      const at = { x: place(begin), y: tall * 0.1, width: wide, height: tall * 0.8 };
      return <rect key={begin} {...at} fill={color} fillOpacity={0.7} />;
    });
  const left = Math.min(width / 2, 14 + Math.max(...names.map((name) => UI.measureText(name, 12).width)));
  const items = [...seen].map(([label, color]) => ({ label, color, yAxis: 1 }));
  return (
    <div>
      <Sketch {...{ theme, span, width, mark, names, left }} height={height - 34} />
      <UI.VizLegend items={items} displayMode="list" placement="bottom" />
    </div>
  );
}

const DRAWN = { stat: Stat, timeseries: Lines, bargauge: Bars, table: Rows };
const SKETCHED = { heatmap: Heatmap, "state-timeline": States };

class Guard extends React.Component {
  state = { failed: false };
  static getDerivedStateFromError = () => ({ failed: true });
  componentDidCatch = (error) => this.props.tell(String(error?.stack ?? error));
  render = () => (this.state.failed ? null : this.props.children);
}

// A panel at its place; rows above it that are not shown take no room.
function Placed({ panel, top, column, drawing }) {
  const { h, w, x, y } = panel.gridPos;
  const tall = h * CELL.height + (h - 1) * CELL.gap;
  const wide = w * column + (w - 1) * CELL.gap;
  const at = { left: CELL.gap * 2 + x * (column + CELL.gap), top: (y - top) * (CELL.height + CELL.gap) + CELL.gap };
  const Kind = DRAWN[panel.type] ?? SKETCHED[panel.type];
  const note = panel.type in SKETCHED && <span className="note">sketched, not drawn by Grafana</span>;
  const { title, description } = panel;
  return (
    <div className="placed" data-panel={panel.file} style={{ ...at, width: wide, height: tall }}>
      <Guard tell={(error) => drawing.failed.push({ panel: panel.title, error })}>
        <UI.PanelChrome {...{ title, description }} titleItems={note} width={wide} height={tall}>
          {(width, height) =>
            Kind === Stat || panel.frames.length ? (
              <Kind {...{ ...drawing, panel, frames: panel.frames, width, height }} />
            ) : (
              <Nothing panel={panel} />
            )
          }
        </UI.PanelChrome>
      </Guard>
    </div>
  );
}

const Heading = ({ title, y }) => (
  <div className="heading" style={{ top: y * (CELL.height + CELL.gap) + CELL.gap, left: CELL.gap * 2 }}>
    <UI.Icon name="angle-down" /> {title}
  </div>
);

const sheet = (theme) => `
  html, body { margin: 0; background: ${theme.colors.background.canvas}; }
  .placed, .heading { position: absolute; }
  .heading, .nothing { display: flex; align-items: center; }
  .heading { height: ${CELL.height}px; gap: 8px; font-size: 18px; font-weight: 500; }
  .nothing { height: 100%; justify-content: center; color: ${theme.colors.text.secondary}; }
  .note { font-size: 11px; color: ${theme.colors.text.secondary}; }`;

// Draws rows [{title, panels}] one below the other; window.failed are panels that could not be, with their errors.
window.draw = async ({ rows, range, mode, width }) => {
  const theme = D.createTheme({ colors: { mode } });
  // A canvas does not wait for its font.
  await Promise.all([400, 500].map((weight) => document.fonts.load(`${weight} 12px Inter`)));
  const [from, to] = [D.dateTime(range.begin), D.dateTime(range.end)];
  const drawing = { theme, span: range, range: { from, to, raw: { from, to } }, failed: [] };
  window.failed = drawing.failed;
  const column = (width - CELL.gap * 4 - CELL.gap * (COLUMNS - 1)) / COLUMNS;
  const parts = [<style key="sheet">{sheet(theme)}</style>];
  let line = 0;
  for (const { title, panels } of rows) {
    parts.push(<Heading key={title} title={title} y={line} />);
    const top = Math.min(...panels.map((panel) => panel.gridPos.y)) - line - 1;
    for (const panel of panels) {
      panel.frames = await framesOf(panel, range.step, theme);
      parts.push(<Placed key={panel.file} {...{ panel, top, column, drawing }} />);
    }
    line = Math.max(...panels.map((panel) => panel.gridPos.y + panel.gridPos.h)) - top;
  }
  const root = document.getElementById("root");
  root.style.height = `${line * (CELL.height + CELL.gap) + CELL.gap * 2}px`;
  createRoot(root, { onUncaughtError: (error) => drawing.failed.push({ panel: "page", error: String(error) }) }).render(
    <D.ThemeContext.Provider value={theme}>
      <UI.GlobalStyles />
      {parts}
    </D.ThemeContext.Provider>,
  );
};
