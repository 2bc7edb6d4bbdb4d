//! Whether the agent is alive and ready, for whoever has to decide about restarting it or sending it traffic.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use crate::clock::monotonic_ns;

/// Shared by the event loop, which writes, and the server, which reads.
#[derive(Debug)]
pub struct Health {
    turned_ns: AtomicU64,
    limit_ns: u64,
    is_attached: AtomicBool,
    is_draining: AtomicBool,
    watched: AtomicUsize,
}

/// An answer, with its reasons.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// `ok`, or what is wrong.
    pub status: &'static str,
    /// Why it is not `ok`.
    pub reasons: Vec<String>,
    /// Processes being watched.
    pub watched_processes: usize,
}

impl Health {
    /// Not ready yet. The event loop may take `limit_seconds` for a turn.
    pub fn new(limit_seconds: u64) -> Self {
        Self {
            turned_ns: AtomicU64::new(monotonic_ns()),
            limit_ns: limit_seconds.saturating_mul(1_000_000_000),
            is_attached: AtomicBool::new(false),
            is_draining: AtomicBool::new(false),
            watched: AtomicUsize::new(0),
        }
    }

    /// The event loop has turned.
    pub fn turned(&self, watched_count: usize) {
        self.turned_ns.store(monotonic_ns(), Ordering::Relaxed);
        self.watched.store(watched_count, Ordering::Relaxed);
    }

    /// The programs are attached, and what was running is watched.
    pub fn attached(&self) {
        self.is_attached.store(true, Ordering::Relaxed);
    }

    /// It is ending.
    pub fn draining(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
    }

    /// Whether the event loop turns.
    pub fn live(&self) -> Answer {
        let age_ns = monotonic_ns().saturating_sub(self.turned_ns.load(Ordering::Relaxed));
        let reasons = (age_ns > self.limit_ns)
            .then(|| format!("the event loop has not turned for {} s", age_ns / 1_000_000_000))
            .into_iter()
            .collect();
        self.answer("stuck", reasons)
    }

    /// Whether everything that happens from now on is seen.
    pub fn ready(&self) -> Answer {
        let mut reasons = self.live().reasons;
        if !self.is_attached.load(Ordering::Relaxed) {
            reasons.push("programs are not attached yet".to_owned());
        }
        if self.is_draining.load(Ordering::Relaxed) {
            reasons.push("shutting down".to_owned());
        }
        self.answer("not ready", reasons)
    }

    fn answer(&self, wrong: &'static str, reasons: Vec<String>) -> Answer {
        Answer {
            status: if reasons.is_empty() { "ok" } else { wrong },
            reasons,
            watched_processes: self.watched.load(Ordering::Relaxed),
        }
    }
}

/// `/healthz` and `/readyz`.
pub(super) fn routes(health: &Arc<Health>) -> Router {
    let (live, ready) = (Arc::clone(health), Arc::clone(health));
    Router::new()
        .route("/healthz", get(move || async move { respond(live.live()) }))
        .route("/readyz", get(move || async move { respond(ready.ready()) }))
}

fn respond(answer: Answer) -> (StatusCode, Json<Answer>) {
    let status = if answer.reasons.is_empty() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_ready_only_between_attaching_and_draining() {
        let health = Health::new(30);
        assert!(health.live().reasons.is_empty());
        assert_eq!(health.ready().status, "not ready");
        health.attached();
        assert_eq!(health.ready().status, "ok");
        health.draining();
        assert_eq!(health.ready().reasons, ["shutting down"]);
    }

    #[test]
    fn an_event_loop_that_does_not_turn_is_stuck() {
        let health = Health::new(0);
        while health.live().status == "ok" {}
        assert_eq!(health.live().status, "stuck");
    }
}
