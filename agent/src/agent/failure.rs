//! Why the agent cannot go on: a part that it needs has ended, though nobody has asked it to.

use anyhow::anyhow;
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::RecvError;
use tokio::task::JoinError;

use crate::span::Capture;

/// Gets what the event loop ends with.
pub(super) type Collected = oneshot::Receiver<anyhow::Result<Capture>>;

/// The event loop has ended with this.
pub(super) fn of_event_loop(result: Result<anyhow::Result<Capture>, RecvError>) -> anyhow::Error {
    match result {
        Ok(Ok(_)) => anyhow!("the event loop ended"),
        Ok(Err(error)) => error.context("the event loop ended"),
        Err(_) => anyhow!("the event loop panicked"),
    }
}

/// The stages have ended with this. Without a panic that is because nobody gives them traces any more, which has a reason of its own.
pub(super) async fn of_stages(result: Result<(), JoinError>, collected: &mut Collected) -> anyhow::Error {
    match result {
        Ok(()) => of_event_loop(collected.await),
        Err(error) => anyhow::Error::new(error).context("the stages panicked"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_has_panicked_is_named_and_stages_end_for_the_reason_that_the_event_loop_has() {
        let panicking = tokio::spawn(async { panic!("on purpose") });
        let (loop_of_panicking, mut collected) = oneshot::channel();
        let error = format!("{:#}", of_stages(panicking.await, &mut collected).await);
        assert!(
            error.starts_with("the stages panicked: ") && error.contains("on purpose"),
            "{error}"
        );
        drop(loop_of_panicking);

        let (ended, mut collected) = oneshot::channel();
        ended.send(Err(anyhow!("no more records"))).unwrap();
        let error = of_stages(Ok(()), &mut collected).await;
        assert_eq!(format!("{error:#}"), "the event loop ended: no more records");

        let (panicked, mut collected) = oneshot::channel();
        drop(panicked);
        let error = of_stages(Ok(()), &mut collected).await;
        assert_eq!(format!("{error:#}"), "the event loop panicked");
    }
}
