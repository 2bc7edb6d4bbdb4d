//! `forever`: `calls` without an end, for tests that kill things.

use std::time::Duration;

use super::{Scenario, TaskFuture, calls};
use crate::options::Options;
use crate::session::Session;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "forever",
    about: "`calls` until killed; prints the number of host calls so far every 100 ms",
    task,
    heartbeat: Some(Duration::from_millis(100)),
    ..calls::SCENARIO
};

fn task<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        loop {
            session.call::<u32, u32>(0, "start", options.calls).await??;
        }
    })
}
