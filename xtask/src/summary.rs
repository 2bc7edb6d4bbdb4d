//! What a run of several stages came to: a table with times, and the sum of its tests in the last line.

use std::fmt;
use std::time::Duration;

use crate::step::seconds;

/// How one stage ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Ok,
    /// Tests were run.
    Tests(Count),
    Failed(String),
    LeftOut(String),
}

/// Tests by result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

#[derive(Debug)]
struct Stage {
    name: &'static str,
    took: Duration,
    outcome: Outcome,
}

/// Stages in the order they ran.
#[derive(Debug, Default)]
pub(crate) struct Summary(Vec<Stage>);

impl Summary {
    pub(crate) fn add(&mut self, name: &'static str, took: Duration, outcome: Outcome) {
        self.0.push(Stage { name, took, outcome });
    }

    /// Whether every stage that ran did well.
    pub(crate) fn is_success(&self) -> bool {
        self.count().failed == 0
    }

    pub(crate) fn left_out(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().filter_map(|stage| match &stage.outcome {
            Outcome::LeftOut(reason) => Some((stage.name, reason.as_str())),
            _ => None,
        })
    }

    /// Tests, and each stage that failed otherwise as one failure.
    fn count(&self) -> Count {
        let mut sum = Count::default();
        for stage in &self.0 {
            match &stage.outcome {
                Outcome::Tests(count) => {
                    sum.passed += count.passed;
                    sum.failed += count.failed;
                }
                Outcome::Failed(_) => sum.failed += 1,
                Outcome::Ok | Outcome::LeftOut(_) => {}
            }
        }
        sum
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|stage| stage.name.len()).max().unwrap_or(0);
        for Stage { name, took, outcome } in &self.0 {
            let took = seconds(*took);
            let words = match outcome {
                Outcome::Ok => "ok".to_owned(),
                Outcome::Tests(Count { passed, failed: 0 }) => format!("ok, {passed} passed"),
                Outcome::Tests(Count { passed, failed }) => format!("FAILED, {passed} passed, {failed} failed"),
                Outcome::Failed(reason) => format!("FAILED: {reason}"),
                Outcome::LeftOut(reason) => format!("LEFT OUT: {reason}"),
            };
            writeln!(formatter, "{name:<width$}  {took:>12}  {words}")?;
        }
        let Count { passed, failed } = self.count();
        write!(formatter, "{passed} passed, {failed} failed")
    }
}

impl Count {
    /// Adds the line in which a test executable sums itself up; other lines change nothing.
    pub(crate) fn add_line(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else {
            return;
        };
        let number = |word: &str| {
            let field = result
                .split([';', '.'])
                .map(str::trim)
                .find_map(|field| field.strip_suffix(word));
            field.and_then(|number| number.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        self.passed += number("passed");
        self.failed += number("failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_executables_are_summed() {
        let mut count = Count::default();
        count
            .add_line("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.01s");
        count.add_line(
            "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
        );
        count.add_line("test x ... ok");
        assert_eq!(count, Count { passed: 14, failed: 3 });
    }

    #[test]
    fn the_last_line_is_the_sum_and_a_failed_stage_counts() {
        let mut summary = Summary::default();
        summary.add("format", Duration::ZERO, Outcome::Failed("differs".to_owned()));
        summary.add(
            "unit tests",
            Duration::ZERO,
            Outcome::Tests(Count { passed: 5, failed: 0 }),
        );
        assert_eq!(summary.to_string().lines().last(), Some("5 passed, 1 failed"));
        assert!(!summary.is_success());
    }

    #[test]
    fn what_is_left_out_is_no_failure_by_itself() {
        let mut summary = Summary::default();
        summary.add(
            "integration tests",
            Duration::ZERO,
            Outcome::LeftOut("not root".to_owned()),
        );
        assert!(summary.is_success());
        assert_eq!(
            summary.left_out().collect::<Vec<_>>(),
            [("integration tests", "not root")]
        );
    }
}
