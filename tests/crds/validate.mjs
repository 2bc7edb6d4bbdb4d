// validate.mjs: reads a JSON list of manifests on stdin; those of the Prometheus operator's kinds must be as its definitions say. Prints how many
// there were.
import * as monitoring from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";
import { readFileSync } from "node:fs";

const OPERATOR = "monitoring.coreos.com/v1";
const manifests = JSON.parse(readFileSync(0, "utf8")).filter((manifest) => manifest.apiVersion === OPERATOR);
for (const manifest of manifests) {
    const Kind = monitoring[manifest.kind];
    if (Kind === undefined) {
        throw new Error(`${OPERATOR} has no ${manifest.kind}`);
    }
    new Kind(manifest).validate();
}
console.log(manifests.length);
