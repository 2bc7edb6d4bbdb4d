// Draws one dashboard with Grafana's own components, from a live Prometheus. A renderer, not a Grafana server: it knows the panels that our dashboards have.
import React, { useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import {
  DataFrame, FieldType, createTheme, getDisplayProcessor,
  toDataFrame, dateTime, ThemeContext, formattedValueToString, getValueFormat,
} from '@grafana/data';
import { BigValue, BigValueColorMode, BigValueGraphMode, PanelChrome, TimeSeries, LegendDisplayMode, GlobalStyles } from '@grafana/ui';

declare const DASHBOARD: any;
declare const PROMETHEUS: string;
declare const SECONDS: number;

const theme = createTheme({ colors: { mode: 'dark' } });
const COLUMN = 64;
const ROW = 38;
const end = Math.floor(Date.now() / 1000);
const start = end - SECONDS;
const step = Math.max(2, Math.floor(SECONDS / 100));
const range = { from: dateTime(start * 1000), to: dateTime(end * 1000), raw: { from: 'now-1h', to: 'now' } } as any;

const substituted = (query: string) => query.replaceAll('$__rate_interval', '30s').replace(/\$(cluster|node|namespace|pod|module)\b/g, '.*');
const legend = (format: string, labels: Record<string, string>) =>
  format.replace(/{{\s*(\w+)\s*}}/g, (_, name) => labels[name] ?? '') || Object.values(labels).join(' ') || 'value';

async function ask(target: any): Promise<any[]> {
  const query = encodeURIComponent(substituted(target.expr));
  const url = target.instant
    ? `${PROMETHEUS}/api/v1/query?query=${query}&time=${end}`
    : `${PROMETHEUS}/api/v1/query_range?query=${query}&start=${start}&end=${end}&step=${step}`;
  const answer = await (await fetch(url)).json();
  if (answer.status !== 'success') {
    throw new Error(`${target.expr}: ${answer.error}`);
  }
  return answer.data.result;
}

const number = (text: string) => (text === 'NaN' ? null : Number(text));
const bound = (text: string) => (text === '+Inf' ? Infinity : Number(text));

function frames(panel: any, results: any[][]): DataFrame[] {
  const frames = results.flatMap((series, index) =>
    series.map((one: any) => {
      const { __name__, ...labels } = one.metric;
      const name = legend(panel.targets[index].legendFormat, labels);
      return toDataFrame({
        name,
        fields: [
          { name: 'time', type: FieldType.time, values: one.values.map((at: any) => at[0] * 1000) },
          { name: 'value', type: FieldType.number, values: one.values.map((at: any) => number(at[1])), labels, config: { ...panel.fieldConfig.defaults, displayName: name } },
        ],
      });
    })
  );
  frames.forEach((frame, index) =>
    frame.fields.forEach((field) => {
      if (field.type === FieldType.number) {
        field.state = { seriesIndex: index };
        field.config.color = panel.type === 'timeseries' ? { mode: 'palette-classic' } : field.config.color;
      }
      field.display = getDisplayProcessor({ field, theme });
    })
  );
  return frames;
}

function tableFrame(panel: any, results: any[][]): DataFrame {
  // As Grafana's `merge`: rows are one row if they agree in the columns that all queries have.
  const shared = results.filter((series) => series.length > 0).map((series) => Object.keys(series[0].metric)).reduce((all, names) => all.filter((name) => names.includes(name)));
  const rename = panel.transformations.find((one: any) => one.id === 'organize').options;
  const single = results.length === 1;
  const rows = new Map<string, { labels: Record<string, string>; values: (number | null)[] }>();
  results.forEach((series, index) =>
    series.forEach((one: any) => {
      const { __name__, ...labels } = one.metric;
      const key = JSON.stringify(shared.map((name) => labels[name]));
      const row = rows.get(key) ?? { labels: {}, values: results.map(() => null) };
      row.labels = { ...row.labels, ...labels };
      row.values[index] = number(one.value[1]);
      rows.set(key, row);
    })
  );
  const sorted = [...rows.values()].sort((a, b) => (b.values[0] ?? -1) - (a.values[0] ?? -1));
  const names = [...new Set(sorted.flatMap((row) => Object.keys(row.labels)))].filter((name) => !rename.excludeByName[name]);
  const unit = (name: string) => panel.fieldConfig.overrides.find((one: any) => one.matcher.options === name)?.properties.find((one: any) => one.id === 'unit')?.value;
  const frame = toDataFrame({
    fields: [
      ...names.map((name) => ({ name: rename.renameByName[name] ?? name, type: FieldType.string, values: sorted.map((row) => row.labels[name] ?? '') })),
      ...results.flatMap((_, index) => {
        const value = single ? 'Value' : `Value #${String.fromCharCode(65 + index)}`;
        const name = rename.renameByName[value];
        return rename.excludeByName[value] ? [] : { name, type: FieldType.number, values: sorted.map((row) => row.values[index]), config: { unit: unit(name) } };
      }),
    ],
  });
  frame.fields.forEach((field) => (field.display = getDisplayProcessor({ field, theme })));
  return frame;
}

// The component of heat maps is not published: cells in the colours of the scheme, the same data.
function Heat({ results, width, height, unit }: any) {
  const buckets = results[0].map((one: any) => ({ le: bound(one.metric.le), values: one.values })).sort((a: any, b: any) => a.le - b.le);
  const times = [...new Set(buckets.flatMap((one: any) => one.values.map((at: any) => at[0])))].sort() as number[];
  const at = buckets.map((one: any) => new Map(one.values.map((pair: any) => [pair[0], Number(pair[1]) || 0])));
  const cells = at.map((row: any, index: number) => times.map((time) => Math.max(0, (row.get(time) ?? 0) - (index ? at[index - 1].get(time) ?? 0 : 0))));
  const most = Math.max(...cells.flat(), 1e-9);
  const left = 64;
  const cell = { w: (width - left) / times.length, h: (height - 20) / buckets.length };
  return (
    <svg width={width} height={height}>
      {cells.map((row: number[], y: number) => row.map((value, x) => value > 0 && (
        <rect key={`${x},${y}`} x={left + x * cell.w} y={height - 20 - (y + 1) * cell.h} width={Math.max(1, cell.w - 1)} height={Math.max(1, cell.h - 1)} fill={`rgba(255,152,48,${0.15 + 0.85 * Math.sqrt(value / most)})`} />
      )))}
      {buckets.map((one: any, y: number) => y % 3 === 0 && (
        <text key={y} x={left - 6} y={height - 20 - y * cell.h - cell.h / 2 + 4} textAnchor="end" fontSize="11" fill={theme.colors.text.secondary}>
          {Number.isFinite(one.le) ? formattedValueToString(getValueFormat(unit)(one.le)) : '∞'}
        </text>
      ))}
    </svg>
  );
}

// Grafana's table wants the translations that its server loads: plain rows in its colours, with its units.
function Rows({ frame, width, height }: { frame: DataFrame; width: number; height: number }) {
  const cell = { padding: '4px 8px', textAlign: 'left', borderBottom: `1px solid ${theme.colors.border.weak}`, whiteSpace: 'nowrap' } as const;
  return (
    <div style={{ width, height, overflow: 'hidden' }}>
      <table style={{ width: '100%', borderCollapse: 'collapse', fontSize: 13 }}>
        <thead><tr>{frame.fields.map((field) => <th key={field.name} style={{ ...cell, color: theme.colors.primary.text }}>{field.name}</th>)}</tr></thead>
        <tbody>{Array.from({ length: frame.length }, (_, row) => (
          <tr key={row}>{frame.fields.map((field) => {
            const value = field.values[row];
            return <td key={field.name} style={cell}>{value === null ? '' : field.type === FieldType.number ? formattedValueToString(field.display!(value)) : String(value)}</td>;
          })}</tr>
        ))}</tbody>
      </table>
    </div>
  );
}

function Inside({ panel, results, width, height }: any) {
  const isEmpty = results.every((series: any[]) => series.length === 0);
  if (isEmpty) {
    return <div className="no-data" style={{ color: theme.colors.text.secondary, padding: 16 }}>No data</div>;
  }
  if (panel.type === 'table') {
    return <Rows frame={tableFrame(panel, results)} width={width} height={height} />;
  }
  if (panel.type === 'heatmap') {
    return <Heat results={results} width={width} height={height} unit={panel.options.yAxis.unit} />;
  }
  const drawn = frames(panel, results);
  if (panel.type === 'stat') {
    const field = drawn[0].fields[1];
    const values = field.values.filter((value: any) => value !== null);
    const display = field.display!(values[values.length - 1]);
    return <BigValue theme={theme} width={width} height={height} value={display} colorMode={BigValueColorMode.Value} graphMode={BigValueGraphMode.Area}
      sparkline={{ x: drawn[0].fields[0], y: field }} />;
  }
  return (
    <TimeSeries frames={drawn} structureRev={1} timeRange={range} timeZone="utc" width={width} height={height} options={{} as any}
      legend={{ displayMode: LegendDisplayMode.List, placement: 'bottom', showLegend: true, calcs: [] } as any} />
  );
}

function Panel({ panel }: any) {
  const [results, setResults] = useState<any[][] | null>(null);
  useEffect(() => {
    Promise.all((panel.targets ?? []).map(ask)).then(setResults, (error) => { document.title = `error: ${error}`; setResults([]); });
  }, []);
  const { x, y, w, h } = panel.gridPos;
  const box = { left: x * COLUMN, top: y * ROW, width: w * COLUMN - 8, height: h * ROW - 8 };
  if (panel.type === 'row') {
    return <div style={{ position: 'absolute', ...box, color: theme.colors.text.primary, fontWeight: 500, lineHeight: `${ROW}px` }}>▾ {panel.title}</div>;
  }
  return (
    <div style={{ position: 'absolute', ...box }}>
      <PanelChrome title={panel.title} description={panel.description} width={box.width} height={box.height}>
        {(width: number, height: number) => results && <Inside panel={panel} results={results} width={width} height={height} />}
      </PanelChrome>
    </div>
  );
}

document.body.style.cssText = `margin:0;background:${theme.colors.background.canvas};font-family:${theme.typography.fontFamily};color:${theme.colors.text.primary};font-size:14px`;
const bottom = Math.max(...DASHBOARD.panels.map((one: any) => one.gridPos.y + one.gridPos.h));
createRoot(document.getElementById('root')!).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <h3 style={{ padding: '8px 8px 0', margin: 0, fontWeight: 500 }}>{DASHBOARD.title}</h3>
    <div style={{ position: 'relative', margin: 8, width: 24 * COLUMN, height: bottom * ROW }}>
      {DASHBOARD.panels.map((panel: any) => <Panel key={panel.id} panel={panel} />)}
    </div>
  </ThemeContext.Provider>
);
