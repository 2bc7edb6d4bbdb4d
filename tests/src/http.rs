//! As much of an HTTP client as a scrape takes.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

/// The whole response, head and body, to a `GET` of `http://ADDRESS:PORT/PATH`.
pub fn get(url: &str) -> String {
    let (address, path) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
        .unwrap_or_else(|| panic!("not an HTTP URL: {url}"));
    let mut connection = TcpStream::connect(address).expect("it listens");
    write!(
        connection,
        "GET /{path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )
    .expect("it reads the request");
    let mut response = String::new();
    connection.read_to_string(&mut response).expect("it answers");
    response
}
