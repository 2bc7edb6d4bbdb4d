//! A recording asked the questions that an agent is asked. It is read once for each, so that memory does not grow with it.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    path::PathBuf,
};

use anyhow::Context as _;

use super::super::replay;
use crate::{
    recorder::{Context, Format, Page, Question, Summary, View, render},
    recording::Header,
    span::{Capture, TraceId},
};

pub(super) struct Recorded {
    path: PathBuf,
}

impl Recorded {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(super) fn list(&self, question: &Question) -> anyhow::Result<Page> {
        // Nothing is kept for a reason in a recording: any trace may be the random one.
        let mut question = question.clone();
        let random = question.kept_because.take().map(|_| RandomState::new());
        let (header, capture) = self.account()?;
        let end_unix_ns = header
            .clock
            .unix_ns
            .saturating_add(capture.end_ns)
            .saturating_sub(header.clock.monotonic_ns);
        let query = question.check(end_unix_ns).map_err(anyhow::Error::msg)?;
        let mut listed: BTreeMap<_, Summary> = BTreeMap::new();
        let mut page = Page::default();
        replay::traces(&self.path, |trace| {
            page.kept_count += 1;
            let view = View::of(trace, header.clock);
            if !query.admits(&view) {
                return;
            }
            page.matching_count += 1;
            let mut position = query.position(&view);
            if let Some(random) = &random {
                position.0 = random.hash_one(trace.id);
            }
            listed.insert(position, view.summary());
            if listed.len() > query.limit() {
                listed.pop_first();
            }
        })?;
        page.traces = listed.into_values().rev().collect();
        Ok(page)
    }

    pub(super) fn written(&self, id: &str, format: Format, width: usize) -> anyhow::Result<String> {
        let id: TraceId = id.parse()?;
        let (header, mut capture) = self.account()?;
        let mut found = None;
        let mut trace_count = 0;
        replay::traces(&self.path, |trace| {
            trace_count += 1;
            if trace.id == id {
                found = Some(trace.clone());
            }
        })?;
        let trace = found.context("no trace with that id is in the recording")?;
        capture.trace_count = trace_count;
        capture.replay_of = Some(replay::origin(&header));
        Ok(render(
            &trace,
            &Context::of_capture(header.clock, capture),
            format,
            width,
        )?)
    }

    fn account(&self) -> anyhow::Result<(Header, Capture)> {
        replay::account(&self.path)
    }
}
