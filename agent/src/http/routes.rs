//! What every server of the agent's answers: the index, `/metrics` in the format that the client prefers, and clear refusals.

use std::sync::Arc;

use axum::Router;
use axum::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::routing::get;
use tokio::sync::Semaphore;

use crate::metrics::{Format, Metrics};

/// Scrapes that are written at a time.
const MAX_ENCODERS: usize = 2;

/// `parts` with an index at `/`, and answers for what does not exist or is not allowed.
pub fn router(parts: Router, index: &'static str) -> Router {
    parts
        .route("/", get(move || async move { index }))
        .fallback(|| async { (StatusCode::NOT_FOUND, "not found; / lists what there is\n") })
        .method_not_allowed_fallback(|| async { (StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n") })
        .layer(axum::middleware::map_response(harden))
}

/// `/metrics`, in the format that the scraper prefers.
///
/// With thousands of series, writing them takes long enough to be kept from the threads that answer everything else.
pub fn metrics_routes(metrics: Arc<Metrics>) -> Router {
    let encoders = Arc::new(Semaphore::new(MAX_ENCODERS));
    let answer = move |headers: HeaderMap| async move {
        let accepted = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
        let format = Format::of_accept(accepted);
        let permit = encoders.acquire_owned().await.expect("the semaphore is never closed");
        let encoded = tokio::task::spawn_blocking(move || {
            // Held by the work itself: it goes on when nobody waits for it any more.
            let _permit = permit;
            metrics.encode_as(format)
        });
        match encoded.await {
            Ok(bytes) => Ok(([(CONTENT_TYPE, format.content_type())], bytes)),
            Err(_) => Err((StatusCode::INTERNAL_SERVER_ERROR, "metrics cannot be written\n")),
        }
    };
    Router::new().route("/metrics", get(answer))
}

async fn harden(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
