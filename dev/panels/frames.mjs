// What Prometheus answered, as the frames that Grafana's data source makes of it: plain objects for toDataFrame.
//
// A panel is one file of tests/observability: {title, type, fieldConfig, options, transformations?, gridPos, results},
// where a result is {refId, legendFormat, format?, resultType, result} with result as in Prometheus' HTTP API.

// A value of Prometheus' JSON ("1.5", "NaN", "+Inf") as a number.
export const number = (text) => (/Inf$/.test(text) ? (text[0] === "-" ? -Infinity : Infinity) : Number(text));

const samples = (series) => (series.values ?? [series.value]).map(([at, text]) => [at * 1000, number(text)]);

// {{label}} replaced; "__auto" is the labels, or the query where there are none.
export function nameOf(labels, { legendFormat, query }) {
  if (legendFormat !== "__auto") return legendFormat.replace(/{{\s*(\w+)\s*}}/g, (_, label) => labels[label] ?? "");
  const shown = Object.entries(labels).filter(([label]) => label !== "__name__");
  const text = shown.map(([label, value]) => `${label}="${value}"`).join(", ");
  return text ? `${labels.__name__ ?? ""}{${text}}` : labels.__name__ ?? query;
}

// One frame for each series: time in milliseconds, value. step: milliseconds; Grafana breaks lines at longer gaps.
export const seriesFrames = (panel, step) =>
  panel.results.flatMap((answer) =>
    answer.result.map((series) => {
      const [points, labels] = [samples(series), series.metric];
      const config = { displayNameFromDS: nameOf(labels, answer) };
      return {
        refId: answer.refId,
        fields: [
          { name: "Time", type: "time", values: points.map(([at]) => at), config: { interval: step } },
          { name: "Value", type: "number", values: points.map(([, value]) => value), labels, config },
        ],
      };
    }),
  );

// One frame for each query: Time, a column for each label, "Value" ("Value #A" where there are several queries).
export function tableFrames(panel) {
  const asked = panel.results.filter((answer) => answer.result.length);
  return asked.map(({ refId, result }) => {
    const labels = [...new Set(result.flatMap((series) => Object.keys(series.metric)))].sort();
    const points = result.map((series) => samples(series)[0]);
    const texts = labels.map((label) => ({
      name: label,
      type: "string",
      values: result.map((series) => series.metric[label] ?? ""),
      config: { filterable: true },
    }));
    const value = panel.results.length > 1 ? `Value #${refId}` : "Value";
    return {
      refId,
      fields: [
        { name: "Time", type: "time", values: points.map(([at]) => at), config: {} },
        ...texts,
        { name: value, type: "number", values: points.map(([, one]) => one), config: {} },
      ],
    };
  });
}

// Cumulative buckets as a heatmap's rows: {times, bounds, counts[row][column]}, the lowest bucket first; a bucket holds
// what is over the bound before it. Problems are what would be drawn wrong, in words.
export function heatmapRows(panel) {
  const problems = [];
  const series = panel.results.flatMap((answer) => answer.result);
  const sorted = series
    .map((one) => ({ bound: number(one.metric.le ?? "NaN"), points: new Map(samples(one)) }))
    .sort((a, b) => a.bound - b.bound);
  const bounds = sorted.map(({ bound }) => bound);
  if (bounds.some(Number.isNaN)) problems.push("a series without le");
  if (new Set(bounds).size !== bounds.length) problems.push("two series of one le");
  if (bounds.length && bounds.at(-1) !== Infinity) problems.push("no bucket +Inf");
  const times = [...new Set(sorted.flatMap(({ points }) => [...points.keys()]))].sort((a, b) => a - b);
  const counts = sorted.map(({ points }, row) =>
    times.map((at) => {
      const [here, below] = [points.get(at), row ? sorted[row - 1].points.get(at) : 0];
      return here === undefined || below === undefined ? null : here - below;
    }),
  );
  if (counts.flat().some((count) => count === null)) problems.push("buckets of unequal times");
  if (counts.flat().some((count) => count < -1e-9)) problems.push("cumulative buckets that fall");
  return { times, bounds, counts, problems };
}

// Stretches of one value: [{begin, end, value}] in milliseconds; a gap of more than a step and a half ends a stretch.
export function stretches(times, values, step) {
  const found = [];
  times.forEach((at, place) => {
    const last = found.at(-1);
    if (last && Object.is(last.value, values[place]) && at <= last.end + step / 2) last.end = at + step;
    else found.push({ begin: at, end: at + step, value: values[place] });
  });
  return found;
}

// The range shown and its step, in milliseconds: what all range queries of a run have in common.
export function rangeOf(panels) {
  const lists = panels.flatMap((panel) => panel.results.flatMap((answer) => answer.result.map(samples)));
  const times = lists.flat().map(([at]) => at);
  const gaps = lists.flatMap((points) => points.slice(1).map(([at], place) => at - points[place][0]));
  const least = (all) => all.reduce((a, b) => Math.min(a, b), Infinity);
  const step = gaps.length ? least(gaps) : 1000;
  return { begin: least(times), end: -least(times.map((at) => -at)), step };
}
