//! What every server of the agent's answers: the index, `/metrics` in the format that the client prefers, and clear refusals.

use axum::Router;
use axum::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;

use super::classic;
use crate::metrics;

/// `parts` with an index at `/`, and answers for what does not exist or is not allowed.
pub fn router(parts: Router, index: &'static str) -> Router {
    parts
        .route("/", get(move || async move { index }))
        .fallback(|| async { (StatusCode::NOT_FOUND, "not found; / lists what there is\n") })
        .method_not_allowed_fallback(|| async { (StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n") })
        .layer(axum::middleware::map_response(harden))
}

/// `/metrics` of what `encode` writes, which is `OpenMetrics` text.
pub fn metrics_routes(encode: impl Fn() -> String + Clone + Send + Sync + 'static) -> Router {
    let answer = move |headers: HeaderMap| async move {
        let text = encode();
        if prefers_classic(&headers) {
            (
                [(CONTENT_TYPE, classic::CONTENT_TYPE)],
                classic::from_openmetrics(&text),
            )
                .into_response()
        } else {
            ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
        }
    };
    Router::new().route("/metrics", get(answer))
}

/// Only who names `text/plain` and not `OpenMetrics` gets the classic format: whoever says nothing gets what has everything.
fn prefers_classic(headers: &HeaderMap) -> bool {
    let mut accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let mut is_plain = false;
    let is_open = accepted.any(|value| {
        is_plain |= value.contains("text/plain");
        value.contains("application/openmetrics-text")
    });
    is_plain && !is_open
}

async fn harden(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
