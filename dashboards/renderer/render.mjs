// node render.mjs PROMETHEUS SECONDS DIRECTORY CHROMIUM DASHBOARD...: one page and one picture for each dashboard; queries without data are named on stderr.
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { build } from 'esbuild';

const [prometheus, seconds, directory, chromium, ...dashboards] = process.argv.slice(2);
mkdirSync(directory, { recursive: true });
// Kubernetes is not there to be asked.
const emptyHere = ['agents: Pods resolved A'];
const hasData = async (query) => {
  const asked = query.replaceAll('$__rate_interval', '30s').replace(/\$(cluster|node|namespace|pod|module|export)\b/g, '.*');
  const end = Date.now() / 1000;
  const parameters = new URLSearchParams({ query: asked, start: end - Number(seconds), end, step: 5 });
  const answer = await (await fetch(`${prometheus}/api/v1/query_range?${parameters}`)).json();
  if (answer.status !== 'success') {
    throw new Error(`${query}: ${answer.error}`);
  }
  return answer.data.result.some((one) => (one.values ?? []).some(([, value]) => Number.isFinite(Number(value))));
};
const script = await build({
  entryPoints: [join(import.meta.dirname, 'render.tsx')],
  bundle: true, write: false, outdir: directory, minify: true, format: 'iife', jsx: 'automatic', logLevel: 'error',
  loader: { '.ttf': 'dataurl', '.woff': 'dataurl', '.woff2': 'dataurl', '.svg': 'dataurl', '.png': 'dataurl' },
  define: { global: 'window', 'process.env.NODE_ENV': '"production"' },
});
const text = (ending) => script.outputFiles.find((one) => one.path.endsWith(ending)).text;
for (const path of dashboards) {
  const name = basename(path, '.json');
  const dashboard = JSON.parse(readFileSync(path, 'utf8'));
  for (const panel of dashboard.panels) {
    for (const target of panel.targets ?? []) {
      if (!(await hasData(target.expr))) {
        const place = `${name}: ${panel.title} ${target.refId}`;
        console.error(`no data: ${place}`);
        if (!emptyHere.includes(place)) {
          process.exitCode = 1;
        }
      }
    }
  }
  const bottom = Math.max(...dashboard.panels.map((one) => one.gridPos.y + one.gridPos.h));
  const page = join(directory, `${name}.html`);
  const constants = `const DASHBOARD=${JSON.stringify(dashboard).replaceAll('<', '\\u003c')},PROMETHEUS=${JSON.stringify(prometheus)},SECONDS=${Number(seconds)};`;
  writeFileSync(page, `<!doctype html><meta charset="utf-8"><style>${text('.css')}</style><body><div id="root"></div><script>${constants}</script><script>${text('.js').replaceAll('</script', '<\\/script')}</script>`);
  execFileSync(chromium, [
    '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--allow-file-access-from-files', '--disable-web-security', `--user-data-dir=${join(directory, 'profile')}`,
    `--window-size=1552,${bottom * 38 + 60}`, '--virtual-time-budget=60000',
    // Otherwise a panel that was drawn late may be missing from the picture.
    '--run-all-compositor-stages-before-draw', `--screenshot=${join(directory, `${name}.png`)}`, `file://${page}`,
  ], { stdio: ['ignore', 'ignore', 'pipe'] });
  console.log(join(directory, `${name}.png`));
}
