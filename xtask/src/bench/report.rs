//! The table of a benchmark: medians, ratios, and what machine they are from.

use std::fmt;
use std::fs;

use super::measure::Measured;
use super::tracer::Subject;

/// Prints itself, plainly or as Markdown.
#[derive(Debug)]
pub(crate) struct Table<'a> {
    pub(crate) results: &'a [Measured],
    pub(crate) rounds: u32,
    pub(crate) calls: u32,
    pub(crate) markdown: bool,
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            results,
            rounds,
            calls,
            markdown,
        } = self;
        let baseline: &[u64] = results.first().map_or(&[], |result| &result.elapsed_ns);
        let mut rows = vec![["traced by", "ns a call", "× untraced", "least … most"].map(str::to_owned)];
        for result in *results {
            let title = result.subject.map_or("nothing", Subject::title).to_owned();
            rows.push(match &result.failure {
                Some(reason) => [title, "–".to_owned(), "–".to_owned(), format!("NOT MEASURED: {reason}")],
                None => measured_row(title, &result.elapsed_ns, baseline, *calls),
            });
        }
        if *markdown {
            let [header, body @ ..] = rows.as_slice() else {
                return Ok(());
            };
            writeln!(formatter, "| {} |\n|---|---:|---:|---:|", header.join(" | "))?;
            body.iter()
                .try_for_each(|row| writeln!(formatter, "| {} |", row.join(" | ")))?;
            writeln!(formatter)?;
        } else {
            let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
            let widths = [width(0), width(1), width(2)];
            for [title, each, ratio, range] in &rows {
                let [first, second, third] = widths;
                writeln!(formatter, "{title:<first$}  {each:>second$}  {ratio:>third$}  {range}")?;
            }
        }
        write!(
            formatter,
            "{}, {} CPUs, Linux {}; medians of {rounds} interleaved rounds of {calls} calls, one write each; ratios are to the \
             untraced run of the same round",
            processor(),
            std::thread::available_parallelism().map_or(0, usize::from),
            fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim(),
        )
    }
}

fn measured_row(title: String, elapsed_ns: &[u64], baseline: &[u64], calls: u32) -> [String; 4] {
    let each: Vec<f64> = elapsed_ns
        .iter()
        .map(|ns| *ns as f64 / f64::from(calls.max(1)))
        .collect();
    let ratios: Vec<f64> = elapsed_ns
        .iter()
        .zip(baseline)
        .map(|(ns, untraced)| *ns as f64 / (*untraced).max(1) as f64)
        .collect();
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(0.0, f64::max);
    [
        title,
        format!("{:.0}", median(each)),
        format!("{:.2}", median(ratios)),
        format!("{least:.2} … {most:.2}"),
    ]
}

/// The value in the middle; not a number if there are none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(markdown: bool) -> String {
        let results = [
            Measured {
                subject: None,
                elapsed_ns: vec![1000, 4000, 2000],
                failure: None,
            },
            Measured {
                subject: Some(Subject::Strace),
                elapsed_ns: vec![3000, 8000, 4000],
                failure: None,
            },
            Measured {
                subject: Some(Subject::Bpftrace),
                elapsed_ns: vec![],
                failure: Some("not installed".to_owned()),
            },
        ];
        Table {
            results: &results,
            rounds: 3,
            calls: 10,
            markdown,
        }
        .to_string()
    }

    #[test]
    fn ratios_are_medians_over_rounds() {
        let text = table(false);
        let line = text.lines().find(|line| line.starts_with("strace")).unwrap();
        let cells: Vec<_> = line.trim_start_matches("strace -f -c").split_whitespace().collect();
        assert_eq!(cells, ["400", "2.00", "2.00", "…", "3.00"]);
    }

    #[test]
    fn what_could_not_be_measured_says_so_instead_of_a_number() {
        let text = table(true);
        let line = text.lines().find(|line| line.contains("bpftrace")).unwrap();
        assert!(line.ends_with("| – | – | NOT MEASURED: not installed |"), "{line}");
    }

    #[test]
    fn an_even_number_of_values_has_a_median_between_two() {
        assert!((median(vec![4.0, 1.0, 3.0, 2.0]) - 2.5).abs() < f64::EPSILON);
    }
}
