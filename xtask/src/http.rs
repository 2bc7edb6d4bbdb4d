//! An HTTP/1.1 GET for talking to the demo host: bounded in time and size, nothing more.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_RESPONSE_BYTES: u64 = 4 * 1024 * 1024;

/// A response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) body: String,
}

/// Gets `path` from `address`.
pub(crate) fn get(address: SocketAddr, path: &str) -> Result<Response> {
    let exchange = || -> Result<Vec<u8>> {
        let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        )?;
        let mut bytes = Vec::new();
        stream.take(MAX_RESPONSE_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    exchange()
        .and_then(|bytes| parse(&bytes))
        .with_context(|| format!("while getting http://{address}{path}"))
}

fn parse(bytes: &[u8]) -> Result<Response> {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .context("the response has no end of headers")?;
    let status = head
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3))
        .context("the response is not HTTP/1.1")?;
    ensure!(
        !head.to_ascii_lowercase().contains("transfer-encoding: chunked"),
        "the response is chunked"
    );
    Ok(Response {
        status: status.parse().context("the status is not a number")?,
        body: body.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_body_are_taken_apart() {
        let response = parse(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\n\r\ntrap").unwrap();
        assert_eq!(
            response,
            Response {
                status: 500,
                body: "trap".to_owned()
            }
        );
    }

    #[test]
    fn half_a_response_is_an_error() {
        assert!(parse(b"HTTP/1.1 200 OK\r\ncontent-le").is_err());
        assert!(parse(b"").is_err());
    }
}
