//! As much of an HTTP client as asking an agent takes: one request a connection, bounded in time and bytes.

use std::{fmt::Write as _, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    Request, StatusCode, Uri,
    header::{CONNECTION, HOST},
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::recorder::{Format, Page, Question};

/// From connecting to the last byte.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Longest answer, bytes; an agent's are shorter.
const MAX_ANSWER_BYTES: usize = 32 << 20;

/// Asks one agent.
pub(super) struct Client {
    host: String,
    port: u16,
    /// What comes before the paths of the API, without a slash at its end.
    prefix: String,
}

impl Client {
    pub(super) fn new(url: &str) -> anyhow::Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("{url:?} is no URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some(scheme) => bail!("the agent speaks http, not {scheme}"),
            None => bail!("{url:?} lacks http:// in front"),
        }
        let host = uri.host().with_context(|| format!("{url:?} names no host"))?;
        Ok(Self {
            host: host.to_owned(),
            port: uri.port_u16().unwrap_or(80),
            prefix: uri.path().trim_end_matches('/').to_owned(),
        })
    }

    pub(super) async fn list(&self, question: &Question) -> anyhow::Result<Page> {
        let answer = self.get(&format!("/api/v1/traces?{}", parameters(question)?)).await?;
        serde_json::from_slice(&answer).context("the agent's list cannot be read; is it of another version?")
    }

    pub(super) async fn trace(&self, id: &str, format: Format, width: usize) -> anyhow::Result<String> {
        let path = format!("/api/v1/traces/{id}?format={}&width={width}", format.name());
        String::from_utf8(self.get(&path).await?).context("the agent's answer is not UTF-8")
    }

    async fn get(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        let authority = format!("{}:{}", self.host, self.port);
        let answer = tokio::time::timeout(TIMEOUT, self.exchange(&authority, path));
        let (status, body) = answer
            .await
            .with_context(|| format!("the agent at {authority} takes longer than {} s", TIMEOUT.as_secs()))??;
        if status.is_success() {
            return Ok(body);
        }
        let said = serde_json::from_slice::<serde_json::Value>(&body)
            .ok()
            .and_then(|said| Some(said.get("error")?.as_str()?.to_owned()));
        match said {
            Some(said) => bail!("{said}"),
            None => bail!("{authority} answers {status}: is it a wasmscope agent with a flight recorder?"),
        }
    }

    async fn exchange(&self, authority: &str, path: &str) -> anyhow::Result<(StatusCode, Vec<u8>)> {
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((host, self.port)).await.with_context(|| {
            format!(
                "no agent can be reached at {authority} (start one with `wasmscope agent`, name another with --agent URL or \
                 WASMSCOPE_AGENT, or forward its port: kubectl port-forward; --recording FILE needs none)"
            )
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .context("while speaking to the agent")?;
        let request = Request::get(format!("{}{path}", self.prefix))
            .header(HOST, authority)
            .header(CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .context("the question is no URL")?;
        let answer = async {
            let response = sender.send_request(request).await.context("while asking the agent")?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!("while reading the agent's answer: {error}"))?;
            Ok((status, body.to_bytes().to_vec()))
        };
        let (answer, ()) = tokio::join!(answer, async {
            // Its errors are those of the answer.
            let _ = connection.await;
        });
        answer
    }
}

/// A question as it goes into a URL.
fn parameters(question: &Question) -> anyhow::Result<String> {
    let serde_json::Value::Object(fields) = serde_json::to_value(question)? else {
        bail!("a question has fields");
    };
    let pairs = fields.iter().map(|(name, value)| match value {
        serde_json::Value::String(text) => format!("{name}={}", escaped(text)),
        other => format!("{name}={other}"),
    });
    Ok(pairs.collect::<Vec<_>>().join("&"))
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a string cannot fail");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_survives_its_way_through_a_url() {
        let question = Question {
            export: Some("a&b=c d/%é+".to_owned()),
            limit: Some(3),
            order: Some(crate::recorder::Order::Latest),
            ..Question::default()
        };
        let uri: Uri = format!("/?{}", parameters(&question).unwrap()).parse().unwrap();
        let axum::extract::Query(back) = axum::extract::Query::<Question>::try_from_uri(&uri).unwrap();
        assert_eq!(back, question);
    }

    #[test]
    fn what_is_no_address_of_an_agent_is_told() {
        for (url, words) in [
            ("https://node:9464", "speaks http"),
            ("node:9464", "http"),
            ("not a url", "no URL"),
        ] {
            let error = Client::new(url).err().expect("it is refused").to_string();
            assert!(error.contains(words), "{url}: {error}");
        }
        let client = Client::new("http://[::1]:9464/node-a/").unwrap();
        assert_eq!(
            (client.host.as_str(), client.port, client.prefix.as_str()),
            ("[::1]", 9464, "/node-a")
        );
    }
}
