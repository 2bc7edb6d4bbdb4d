//! As much of an HTTP client and of a server as scrapes and webhooks take.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Longest body that the server reads, bytes.
const MAX_BODY_BYTES: usize = 16 << 20;

/// The whole response, head and body, to a `GET` of `http://ADDRESS:PORT/PATH`.
pub fn get(url: &str) -> String {
    ask(url, "1.1").expect("it answers")
}

/// The body of the response to a `GET`, in one piece however long it is: HTTP/1.0 knows no chunks.
pub fn body(url: &str) -> String {
    let response = ask(url, "1.0").expect("it answers");
    let (_, body) = response.split_once("\r\n\r\n").expect("a response has a head");
    body.to_owned()
}

/// As [`get`], of who may not answer.
pub fn try_get(url: &str) -> std::io::Result<String> {
    ask(url, "1.1")
}

fn ask(url: &str, version: &str) -> std::io::Result<String> {
    let (address, path) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
        .unwrap_or_else(|| panic!("not an HTTP URL: {url}"));
    let mut connection = TcpStream::connect(address)?;
    write!(
        connection,
        "GET /{path} HTTP/{version}\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut response = Vec::new();
    connection.read_to_end(&mut response)?;
    Ok(String::from_utf8_lossy(&response).into_owned())
}

/// A server that answers one request after the other; stops when dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// On a free loopback port. `answer` gets the path and the body of each request, and its text is what the client gets.
    pub fn start(mut answer: impl FnMut(&str, &str) -> String + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let address = listener.local_addr().expect("it is bound");
        let is_over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&is_over);
        let thread = std::thread::spawn(move || {
            for connection in listener.incoming() {
                if told.load(Ordering::Relaxed) {
                    return;
                }
                // A client that goes away is its own business.
                let _ = connection.and_then(|connection| serve(&connection, &mut answer));
            }
        });
        Self {
            address,
            is_over,
            thread: Some(thread),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(connection: &TcpStream, answer: &mut impl FnMut(&str, &str) -> String) -> std::io::Result<()> {
    let mut reader = BufReader::new(connection);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut length = 0;
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length.min(MAX_BODY_BYTES)];
    reader.read_exact(&mut body)?;
    let text = answer(&path, &String::from_utf8_lossy(&body));
    let mut connection = connection;
    write!(
        connection,
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    )
}
