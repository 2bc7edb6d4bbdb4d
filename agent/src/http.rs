//! The agent's HTTP server: read-only, on loopback unless told otherwise, with bounds on what a client may cost. What it serves are routes that others make.
//!
//! A connection waits until its request is known. Health is answered there and then; everything else takes one of a few slots, for as long as its connection
//! lives. When too many wait, the one that has waited longest is dropped: whatever clients do, somebody who asks for health is the newest of all.

mod routes;
mod waiting;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use self::waiting::{Place, WaitingRoom};

pub use self::routes::{metrics_routes, router};

/// Where to listen when nothing is said: this host only, on the port that is customary for what is scraped of OpenTelemetry programs.
pub const DEFAULT_ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9464);

/// Connections that are being answered at a time, those that ask for health aside.
const MAX_ANSWERING: usize = 16;
/// Connections that have not said yet what they want, or wait until it is their turn.
const MAX_WAITING: usize = 64;
/// What costs nothing to answer and must always be answered.
const HEALTH_PATHS: [&str; 2] = ["/healthz", "/readyz"];
const TIMEOUTS: Timeouts = Timeouts {
    header: Duration::from_secs(5),
    connection: Duration::from_secs(10),
};
/// Request line and headers together.
const MAX_HEADER_BYTES: usize = 16 * 1024;
/// Pause after accepting failed, as it does without end while the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a client may take.
#[derive(Clone, Copy, Debug)]
struct Timeouts {
    /// For the request line and headers.
    header: Duration,
    /// From accepting a connection to the last byte of its only response.
    connection: Duration,
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Server {
    /// Listens on `address` (port 0 picks a free one) and serves `routes`, as [`router`] makes them, on the current
    /// tokio runtime. Fails as binding fails.
    pub async fn start(address: SocketAddr, routes: Router) -> io::Result<Self> {
        Self::start_with(address, routes, TIMEOUTS).await
    }

    async fn start_with(address: SocketAddr, routes: Router, timeouts: Timeouts) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        if !address.ip().is_loopback() {
            warn!(%address, "what is served can be read by whoever reaches this address; it names processes and functions");
        }
        info!(%address, "serving HTTP");
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(accept(listener, routes, timeouts, stopped));
        Ok(Self { address, stop, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops accepting and drops open connections.
    pub async fn shutdown(self) {
        let _ = self.stop.send(true);
        let _ = self.task.await;
    }
}

async fn accept(listener: TcpListener, routes: Router, timeouts: Timeouts, mut stopped: watch::Receiver<bool>) {
    let slots = Arc::new(Semaphore::new(MAX_ANSWERING));
    let room = WaitingRoom::new(MAX_WAITING);
    let mut connections = tokio::task::JoinSet::new();
    let serve = async {
        loop {
            while connections.try_join_next().is_some() {}
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (place, dropped) = room.enter();
                    let served = serve_one(stream, routes.clone(), timeouts, Arc::clone(&slots), place);
                    connections.spawn(async move {
                        tokio::select! {
                            () = served => {}
                            () = dropped => debug!("connection dropped for a newer one"),
                        }
                    });
                }
                Err(error) => {
                    debug!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = serve => {}
        _ = stopped.wait_for(|stop| *stop) => {}
    }
}

async fn serve_one(stream: TcpStream, routes: Router, timeouts: Timeouts, slots: Arc<Semaphore>, place: Place) {
    let place = Arc::new(place);
    // Outlives the answer: a client that reads slowly keeps its slot.
    let permits = Arc::new(std::sync::Mutex::new(Vec::with_capacity(1)));
    let service = service_fn(|request: hyper::Request<hyper::body::Incoming>| {
        let (routes, slots) = (routes.clone(), Arc::clone(&slots));
        let (place, permits) = (Arc::clone(&place), Arc::clone(&permits));
        async move {
            if !HEALTH_PATHS.contains(&request.uri().path()) {
                let permit = slots.acquire_owned().await.expect("the semaphore is never closed");
                place.leave();
                permits
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .push(permit);
            }
            TowerToHyperService::new(routes).call(request).await
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeouts.header)
        .max_buf_size(MAX_HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(timeouts.connection, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "connection failed"),
        Err(_) => debug!("connection took too long"),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::metrics::Metrics;

    fn routes(metrics: Metrics) -> Router {
        let metrics = Arc::new(metrics);
        router(metrics_routes(metrics), "/metrics\n")
    }

    async fn server() -> Server {
        let metrics = Metrics::new();
        metrics.observe_events("syscall", 3);
        Server::start(SocketAddr::from(([127, 0, 0, 1], 0)), routes(metrics))
            .await
            .unwrap()
    }

    async fn exchange(server: &Server, request: &str) -> String {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        response
    }

    #[tokio::test]
    async fn metrics_are_served_as_openmetrics() {
        let server = server().await;
        let response = exchange(
            &server,
            "GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n\r\n",
        )
        .await;
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
        assert!(
            response.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"),
            "{response}"
        );
        assert!(
            response.contains("wasmscope_events_total{kind=\"syscall\"} 3\n"),
            "{response}"
        );
        assert!(response.ends_with("# EOF\n"));
    }

    #[tokio::test]
    async fn the_first_page_points_to_the_metrics() {
        let server = server().await;
        assert!(
            exchange(&server, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                .await
                .contains("/metrics")
        );
    }

    #[tokio::test]
    async fn nothing_can_be_written() {
        let server = server().await;
        let response = exchange(
            &server,
            "POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        )
        .await;
        assert!(response.starts_with("HTTP/1.1 405 "), "{response}");
        assert!(response.to_lowercase().contains("\r\nallow: get"), "{response}");
        assert!(response.contains("only GET and HEAD"), "{response}");
    }

    #[tokio::test]
    async fn who_asks_for_plain_text_gets_the_classic_format() {
        let server = server().await;
        let response = exchange(
            &server,
            "GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: text/plain\r\n\r\n",
        )
        .await;
        assert!(
            response.contains("content-type: text/plain; version=0.0.4"),
            "{response}"
        );
        assert!(
            response.contains("# TYPE wasmscope_events_total counter\nwasmscope_events_total{kind=\"syscall\"} 3\n"),
            "{response}"
        );
        assert!(!response.contains("# EOF"), "{response}");
    }

    #[tokio::test]
    async fn a_head_has_no_body() {
        let server = server().await;
        let response = exchange(&server, "HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(
            response.starts_with("HTTP/1.1 200 OK") && response.ends_with("\r\n\r\n"),
            "{response}"
        );
    }

    #[tokio::test]
    async fn an_unknown_path_is_not_found() {
        let server = server().await;
        assert!(
            exchange(&server, "GET /../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 404 ")
        );
    }

    #[tokio::test]
    async fn headers_without_end_are_refused() {
        let server = server().await;
        let request = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}", "x".repeat(2 * MAX_HEADER_BYTES));
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        // The server may close while it is being written to; both ways it must not answer with the page.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut response = Vec::new();
        let _ = stream.read_to_end(&mut response).await;
        assert!(!String::from_utf8_lossy(&response).contains("200 OK"));
    }

    #[tokio::test]
    async fn clients_that_say_nothing_do_not_keep_others_out() {
        let server = server().await;
        let mut silent = Vec::new();
        for _ in 0..2 * MAX_WAITING {
            silent.push(TcpStream::connect(server.address()).await.unwrap());
        }
        assert!(
            exchange(&server, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 200 OK")
        );
    }

    /// Slots are taken by answers that nobody reads, the waiting room by requests that wait for slots, and more keep coming.
    #[tokio::test]
    async fn health_is_answered_while_everything_else_hangs() {
        let endless = axum::routing::get(std::future::pending::<()>);
        let healthy = axum::routing::get(|| async { "fine" });
        let parts = Router::new().route("/hang", endless).route("/healthz", healthy);
        // Nothing that hangs ends by itself.
        let long = Timeouts {
            header: Duration::from_mins(10),
            connection: Duration::from_mins(10),
        };
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Server::start_with(address, router(parts, ""), long).await.unwrap();
        let mut hanging = Vec::new();
        for round in 0..3 {
            for _ in 0..64 {
                let mut stream = TcpStream::connect(server.address()).await.unwrap();
                stream
                    .write_all(b"GET /hang HTTP/1.1\r\nHost: a\r\n\r\n")
                    .await
                    .unwrap();
                hanging.push(stream);
            }
            let response = exchange(&server, "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").await;
            assert!(response.ends_with("fine"), "{round}: {response}");
        }
    }

    #[tokio::test]
    async fn a_request_that_found_no_slot_is_answered_when_there_is_one() {
        let gate = Arc::new(Semaphore::new(0));
        let (entered, mut entries) = tokio::sync::mpsc::channel(2 * MAX_ANSWERING);
        let held = Arc::clone(&gate);
        let wait = axum::routing::get(move || {
            let (held, entered) = (Arc::clone(&held), entered.clone());
            async move {
                entered.send(()).await.unwrap();
                held.acquire().await.unwrap().forget();
                "done"
            }
        });
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let parts = Router::new().route("/wait", wait);
        let server = Server::start(address, router(parts, "")).await.unwrap();
        let mut streams = Vec::new();
        for _ in 0..MAX_ANSWERING + 4 {
            let mut stream = TcpStream::connect(server.address()).await.unwrap();
            stream
                .write_all(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
                .await
                .unwrap();
            streams.push(stream);
        }
        for _ in 0..MAX_ANSWERING {
            entries.recv().await.unwrap();
        }
        assert!(entries.try_recv().is_err(), "no more at a time than there are slots");
        gate.add_permits(MAX_ANSWERING + 4);
        for mut stream in streams {
            let mut response = String::new();
            stream.read_to_string(&mut response).await.unwrap();
            assert!(response.ends_with("done"), "{response}");
        }
    }

    #[tokio::test]
    async fn a_stopped_server_accepts_nothing() {
        let server = server().await;
        let address = server.address();
        server.shutdown().await;
        assert!(TcpStream::connect(address).await.is_err());
    }
}
