//! What can be asked over HTTP: lists of kept traces, and each in every format. Read-only; bounds what an answer costs.
//!
//! | path | answer |
//! |---|---|
//! | `/api/v1/traces?…` | a [`Page`](super::Page) of summaries; the parameters are those of [`Question`] |
//! | `/api/v1/traces/{id}?format=F` or `/api/v1/traces/{id}.{format}` | one trace; JSON unless asked otherwise |
//! | `/api/v1/traces/slowest?…`, `…/failed?…`, `…/random?…` | the first of such a list, `format` and all |
//! | `/ui` | the list for a person |

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, RawQuery, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;

use super::page;
use super::{FindError, Format, Found, Kept, Order, Question, Recorder, render};
use crate::diagram::text::DEFAULT_WIDTH_COLUMNS;

/// Answers in the making at a time: each may take as much memory as its trace is long.
const MAX_CONCURRENT: usize = 2;
/// How long a question waits for its turn.
const MAX_WAIT: Duration = Duration::from_secs(2);
/// Longest question, bytes.
const MAX_QUERY_BYTES: usize = 4096;

/// The routes that serve a recorder.
pub fn routes(recorder: Arc<Recorder>) -> Router {
    let api = Arc::new(Api {
        recorder,
        turns: Arc::new(Semaphore::new(MAX_CONCURRENT)),
    });
    Router::new()
        .route("/api/v1/traces", get(list))
        .route("/api/v1/traces/{name}", get(one))
        .route("/ui", get(ui))
        .route("/ui/style.css", get(style))
        .with_state(api)
}

struct Api {
    recorder: Arc<Recorder>,
    turns: Arc<Semaphore>,
}

/// How one trace is wanted.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Rendering {
    format: Option<String>,
    width: Option<usize>,
}

#[derive(Debug)]
struct Problem {
    status: StatusCode,
    words: String,
}

impl Problem {
    fn bad_request(words: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            words: words.into(),
        }
    }

    fn not_found(words: impl Into<String>) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            words: words.into(),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::json!({ "error": self.words }).to_string();
        let mut response = content(self.status, "application/json", body);
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<FindError> for Problem {
    fn from(error: FindError) -> Self {
        let status = match error {
            FindError::NotAnId(_) | FindError::Ambiguous { .. } => StatusCode::BAD_REQUEST,
            FindError::Unknown => StatusCode::NOT_FOUND,
        };
        Self {
            status,
            words: error.to_string(),
        }
    }
}

async fn list(State(api): State<Arc<Api>>, RawQuery(query): RawQuery) -> Result<Response, Problem> {
    let question: Question = parse(query.as_deref())?;
    api.run(move |recorder| {
        let query = recorder.query(question).map_err(Problem::bad_request)?;
        Ok(json(&recorder.list(&query)))
    })
    .await
}

async fn one(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, Problem> {
    let shortcut = match name.as_str() {
        "slowest" => Some(Question::default()),
        "failed" => Some(Question {
            outcome: Some("failed".to_owned()),
            order: Some(Order::Latest),
            ..Question::default()
        }),
        "random" => Some(Question {
            kept_because: Some(Kept::Random),
            order: Some(Order::Latest),
            ..Question::default()
        }),
        _ => None,
    };
    if let Some(shortcut) = shortcut {
        let (rendering, asked) = split(query.as_deref())?;
        let format = format(None, &rendering)?;
        let question = Question {
            outcome: asked.outcome.or(shortcut.outcome),
            kept_because: asked.kept_because.or(shortcut.kept_because),
            order: asked.order.or(shortcut.order),
            limit: Some(1),
            ..asked
        };
        return api
            .run(move |recorder| {
                let query = recorder.query(question).map_err(Problem::bad_request)?;
                let page = recorder.list(&query);
                let Some(first) = page.traces.first() else {
                    return Err(Problem::not_found(format!(
                        "none of the {} kept traces matches",
                        page.kept_count
                    )));
                };
                let found = recorder.find(&first.trace_id.to_string())?;
                written(&found, format, &rendering)
            })
            .await;
    }
    let rendering: Rendering = parse(query.as_deref())?;
    let (id, suffix) = match name.split_once('.') {
        Some((id, suffix)) => (id.to_owned(), Some(suffix)),
        None => (name.clone(), None),
    };
    let format = format(suffix, &rendering)?;
    api.run(move |recorder| written(&recorder.find(&id)?, format, &rendering))
        .await
}

async fn ui(State(api): State<Arc<Api>>, RawQuery(query): RawQuery) -> Result<Response, Problem> {
    let question: Question = parse(query.as_deref())?;
    api.run(move |recorder| {
        let query = recorder.query(question.clone()).map_err(Problem::bad_request)?;
        let page = page::html(&recorder.list(&query), &question);
        let mut response = content(StatusCode::OK, "text/html; charset=utf-8", page);
        response.headers_mut().insert(
            CONTENT_SECURITY_POLICY,
            HeaderValue::from_static(
                "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
            ),
        );
        Ok(response)
    })
    .await
}

async fn style() -> Response {
    content(StatusCode::OK, "text/css; charset=utf-8", page::STYLE.to_owned())
}

impl Api {
    /// Does what takes time where it holds up nothing else, a few at a time.
    async fn run<F>(&self, work: F) -> Result<Response, Problem>
    where
        F: FnOnce(&Recorder) -> Result<Response, Problem> + Send + 'static,
    {
        let turn = tokio::time::timeout(MAX_WAIT, Arc::clone(&self.turns).acquire_owned()).await;
        let Ok(Ok(turn)) = turn else {
            return Err(Problem {
                status: StatusCode::SERVICE_UNAVAILABLE,
                words: "too many questions at a time".to_owned(),
            });
        };
        let recorder = Arc::clone(&self.recorder);
        let answer = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work(&recorder)
        });
        answer.await.unwrap_or_else(|error| {
            tracing::error!(%error, "an answer could not be made");
            Err(Problem {
                status: StatusCode::INTERNAL_SERVER_ERROR,
                words: "the answer could not be made".to_owned(),
            })
        })
    }
}

fn written(found: &Found, format: Format, rendering: &Rendering) -> Result<Response, Problem> {
    let trace = found.trace().map_err(|error| Problem {
        status: StatusCode::INTERNAL_SERVER_ERROR,
        words: format!("the kept trace cannot be read: {error}"),
    })?;
    let width = rendering.width.unwrap_or(DEFAULT_WIDTH_COLUMNS);
    let text = render(&trace, &found.context, format, width).map_err(|error| Problem {
        status: StatusCode::PAYLOAD_TOO_LARGE,
        words: error.to_string(),
    })?;
    let mut response = content(StatusCode::OK, format.content_type(), text);
    // Hex digits and a word of ours: nothing in it has to be quoted.
    let name = format!("inline; filename=\"{}.{}\"", found.summary.trace_id, format.extension());
    if let Ok(name) = HeaderValue::from_str(&name) {
        response.headers_mut().insert(CONTENT_DISPOSITION, name);
    }
    Ok(response)
}

fn format(suffix: Option<&str>, rendering: &Rendering) -> Result<Format, Problem> {
    match suffix.or(rendering.format.as_deref()) {
        None => Ok(Format::Json),
        Some(word) => word.parse().map_err(Problem::bad_request),
    }
}

fn parse<T: DeserializeOwned>(query: Option<&str>) -> Result<T, Problem> {
    let query = query.unwrap_or_default();
    if query.len() > MAX_QUERY_BYTES {
        return Err(Problem::bad_request(format!(
            "the question is longer than {MAX_QUERY_BYTES} bytes"
        )));
    }
    let uri = format!("/?{query}")
        .parse()
        .map_err(|_| Problem::bad_request("not a URL"))?;
    let parsed = axum::extract::Query::try_from_uri(&uri);
    // The outer message says where it was read from, the inner what is wrong.
    parsed.map(|axum::extract::Query(value)| value).map_err(|error| {
        let words = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        Problem::bad_request(words)
    })
}

/// A shortcut takes both kinds of parameters.
fn split(query: Option<&str>) -> Result<(Rendering, Question), Problem> {
    let is_rendering = |pair: &&str| matches!(pair.split('=').next(), Some("format" | "width"));
    let pairs = || query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
    let rendering: Vec<&str> = pairs().filter(is_rendering).collect();
    let question: Vec<&str> = pairs().filter(|pair| !is_rendering(pair)).collect();
    Ok((parse(Some(&rendering.join("&")))?, parse(Some(&question.join("&")))?))
}

fn json(value: &impl serde::Serialize) -> Response {
    match serde_json::to_string(value) {
        Ok(body) => content(StatusCode::OK, "application/json", body),
        Err(error) => Problem {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            words: error.to_string(),
        }
        .into_response(),
    }
}

fn content(status: StatusCode, content_type: &'static str, body: String) -> Response {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    (status, headers, body).into_response()
}
