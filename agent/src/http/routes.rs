//! What every server of the agent's answers: the index, `/metrics` in the format that the client prefers, and clear refusals.

use std::sync::Arc;

use axum::Router;
use axum::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::routing::get;

use crate::metrics::{Format, Metrics};

/// `parts` with an index at `/`, and answers for what does not exist or is not allowed.
pub fn router(parts: Router, index: &'static str) -> Router {
    parts
        .route("/", get(move || async move { index }))
        .fallback(|| async { (StatusCode::NOT_FOUND, "not found; / lists what there is\n") })
        .method_not_allowed_fallback(|| async { (StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n") })
        .layer(axum::middleware::map_response(harden))
}

/// `/metrics`, in the format that the scraper prefers.
pub fn metrics_routes(metrics: Arc<Metrics>) -> Router {
    let answer = move |headers: HeaderMap| async move {
        let accepted = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
        let format = Format::of_accept(accepted);
        ([(CONTENT_TYPE, format.content_type())], metrics.encode_as(format))
    };
    Router::new().route("/metrics", get(answer))
}

async fn harden(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
