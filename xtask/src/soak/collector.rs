//! A collector that takes everything over OTLP/HTTP, and can go away and come back on the same port.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// How often it looks whether it is to go, and for new connections.
const POLL: Duration = Duration::from_millis(5);
const READ_LIMIT: Duration = Duration::from_secs(10);
const MAX_BODY_BYTES: u64 = 64 * 1024 * 1024;

/// A running collector; lives as long as the process.
#[derive(Debug)]
pub(super) struct Collector {
    address: SocketAddr,
    is_away: Arc<AtomicBool>,
    departures: AtomicU64,
}

impl Collector {
    pub(super) fn start() -> Result<Self> {
        let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        let address = listener.local_addr()?;
        let is_away = Arc::new(AtomicBool::new(false));
        let shared = Arc::clone(&is_away);
        thread::spawn(move || serve(listener, address, &shared));
        Ok(Self {
            address,
            is_away,
            departures: AtomicU64::new(0),
        })
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Away, connections to it are refused.
    pub(super) fn set_away(&self, is_away: bool) {
        if !self.is_away.swap(is_away, Ordering::Relaxed) && is_away {
            self.departures.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often it went away.
    pub(super) fn departures(&self) -> u64 {
        self.departures.load(Ordering::Relaxed)
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).with_context(|| format!("while listening on {address}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn serve(listener: TcpListener, address: SocketAddr, is_away: &AtomicBool) {
    let mut listener = Some(listener);
    loop {
        if is_away.load(Ordering::Relaxed) {
            listener = None;
        } else if listener.is_none() {
            // Another try follows.
            listener = listen(address).ok();
        }
        match listener.as_ref().map(TcpListener::accept) {
            Some(Ok((stream, _))) => {
                // A sender that goes away is none of its business.
                thread::spawn(move || drop(answer(&stream)));
            }
            _ => thread::sleep(POLL),
        }
    }
}

/// Reads one request and takes it.
fn answer(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(READ_LIMIT))?;
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.by_ref().take(64 * 1024).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse::<u64>().unwrap_or(0).min(MAX_BODY_BYTES);
        }
    }
    std::io::copy(&mut reader.take(length), &mut std::io::sink())?;
    let mut stream = stream;
    stream.write_all(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    )
}
