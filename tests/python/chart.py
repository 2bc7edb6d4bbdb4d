"""Renders the Helm chart as Helm does and validates what came out against the schemas of Kubernetes.

chart.py text CHART VALUES...   the manifests as they would be applied, with their comments
chart.py golden CHART VALUES... the same without what is only copied (dashboards, rules), in one order
chart.py validate FILE...       strict validation of manifests
chart.py json FILE              its manifests as a list
chart.py table FILE             what a values file says of each value, as a table
"""

import json
import sys

import helm_python
import kubernetes_validate
import yaml

VERSIONS = ["1.30", "1.33", kubernetes_validate.latest_version()]
# Kinds of others, whose schemas are not those of Kubernetes.
FOREIGN = {"PodMonitor", "PrometheusRule"}


class Strict(yaml.SafeLoader):
    """Refuses a key that is there twice, of which others take one without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"twice: {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


def render(chart_path, values_paths):
    values = {}
    for path in values_paths:
        with open(path) as file:
            values.update(yaml.safe_load(file) or {})
    chart = helm_python.Chart.load(chart_path)
    chart.validate_schema(values)
    files = chart.render(values, name="wasmscope", namespace="wasmscope")
    # Accounts and rules before what uses them.
    order = ["rbac.yaml", "configmap.yaml", "daemonset.yaml", "monitoring.yaml"]
    named = {path.rsplit("/", 1)[1]: text for path, text in files.items() if path.endswith(".yaml")}
    assert set(named) <= set(order), f"not in the order: {set(named) - set(order)}"
    texts = [named[name].strip() for name in order if named.get(name, "").strip()]
    return "\n---\n".join(text.removeprefix("---").strip() for text in texts) + "\n"


def validate(text, name):
    count = 0
    for document in yaml.load_all(text, Strict):
        if document is None:
            continue
        count += 1
        if document["kind"] in FOREIGN:
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
    if count == 0:
        sys.exit(f"{name}: no manifest")


def golden(text):
    documents = []
    for document in yaml.safe_load_all(text):
        if document["kind"] == "ConfigMap":
            for key, value in document["data"].items():
                if key.endswith(".json"):
                    document["data"][key] = f"dashboard {json.loads(value)['uid']}"
        if document["kind"] == "PrometheusRule":
            groups = document["spec"]["groups"]
            document["spec"] = {group["name"]: [rule.get("alert") or rule["record"] for rule in group["rules"]] for group in groups}
        documents.append(document)
    return yaml.safe_dump_all(documents, sort_keys=False, width=160)


def table(path):
    """Every value with its default and the comment above it; a mapping without values is one."""
    comment, parents, rows = [], [], []
    lines = open(path).read().splitlines()
    for number, line in enumerate(lines):
        text = line.strip()
        if text.startswith("#"):
            comment.append(text.lstrip("# "))
        if not text:
            comment = []
        if not text or text.startswith(("#", "- ")):
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        key, _, value = text.partition(":")
        parents[depth:] = [key]
        below = [other for other in lines[number + 1 :] if other.strip() and not other.strip().startswith("#")]
        indent = len(below[0]) - len(below[0].lstrip()) if below else 0
        # What stands above a group of values says what the group is.
        is_group = not value.strip() and indent > depth * 2 and not below[0].strip().startswith("- ")
        if is_group:
            if comment:
                rows.append((".".join(parents), "", " ".join(comment)))
        else:
            default = yaml.safe_load("\n".join([text] + below[:1])) if not value.strip() else yaml.safe_load(text)
            default = json.dumps(default[key]) if not isinstance(default[key], str) else default[key]
            rows.append((".".join(parents), f"`{default}`" if default else "", " ".join(comment)))
        comment = []
    for row in rows:
        print("| `%s` | %s | %s |" % tuple(cell.replace("|", "\\|") for cell in row))


def main():
    what, *arguments = sys.argv[1:]
    if what == "validate":
        for path in arguments:
            with open(path) as file:
                validate(file.read(), path)
        return
    if what == "json":
        with open(arguments[0]) as file:
            json.dump([document for document in yaml.safe_load_all(file) if document], sys.stdout)
        return
    if what == "table":
        table(arguments[0])
        return
    chart, *values = arguments
    text = render(chart, values)
    validate(text, chart)
    sys.stdout.write(text if what == "text" else golden(text))


main()
