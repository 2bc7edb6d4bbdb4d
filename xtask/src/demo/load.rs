//! The requests of the demo: a few dozen of every kind, from several clients at once.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::mpsc::channel;
use std::thread;

use anyhow::{Context as _, Result};

use crate::http;
use crate::interrupt;

/// Requests in flight at once, so that fibers of different requests share threads.
const CLIENTS: usize = 4;
/// How often each client sends the whole list.
const ROUNDS: usize = 1;
const PATHS: [&str; 8] = [
    "/policy/cart",
    "/transform?op=gray",
    "/policy/checkout",
    "/transform?op=words",
    "/policy/cart",
    "/faulty?kind=memory_out_of_bounds",
    "/transform?op=upper",
    "/faulty?kind=host_error",
];

/// Responses by path (without its query) and status.
#[derive(Debug, Default)]
pub(crate) struct Sent(BTreeMap<(String, u16), u64>);

impl fmt::Display for Sent {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: u64 = self.0.values().sum();
        write!(formatter, "{total} answered:")?;
        self.0
            .iter()
            .try_for_each(|((path, status), count)| write!(formatter, " {path} {status} ×{count}"))
    }
}

/// Sends everything and tells `progress` how many of how many are answered.
pub(crate) fn run(address: SocketAddr, progress: impl Fn(usize, usize)) -> Result<Sent> {
    let (sender, responses) = channel();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let sender = sender.clone();
            thread::spawn(move || {
                for index in 0..PATHS.len() * ROUNDS {
                    // Each client starts elsewhere in the list.
                    let path = PATHS[(index + client) % PATHS.len()];
                    let response = http::get(address, path);
                    let ended = response.is_err() || interrupt::requested();
                    if sender.send((path, response)).is_err() || ended {
                        return;
                    }
                }
            })
        })
        .collect();
    drop(sender);
    let mut sent = Sent::default();
    for (done, (path, response)) in responses.iter().enumerate() {
        let path = path.split('?').next().unwrap_or(path).to_owned();
        *sent.0.entry((path, response?.status)).or_default() += 1;
        progress(done + 1, CLIENTS * ROUNDS * PATHS.len());
    }
    for client in clients {
        client.join().ok().context("a client panicked")?;
    }
    interrupt::check()?;
    Ok(sent)
}
