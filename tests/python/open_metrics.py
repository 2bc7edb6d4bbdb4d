"""Reads a file of OpenMetrics text with the reference parser and prints its samples as JSON; fails if it is not strictly that."""

import json
import math
import sys

from prometheus_client.openmetrics.parser import text_string_to_metric_families

with open(sys.argv[1], encoding="utf-8", newline="") as file:
    families = list(text_string_to_metric_families(file.read()))
samples = [
    {
        "name": sample.name,
        "labels": sample.labels,
        "value": None if math.isnan(sample.value) else sample.value,
    }
    for family in families
    for sample in family.samples
]
json.dump(samples, sys.stdout)
