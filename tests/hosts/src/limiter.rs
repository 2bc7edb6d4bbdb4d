//! Limiters of memories and tables, which say what they are told to.

use std::pin::Pin;

use wasmtime::{ResourceLimiter, ResourceLimiterAsync, Result};

use crate::nap::Bed;

/// What a limiter says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    /// It may grow.
    #[default]
    Allow,
    /// It may not: the guest is given -1.
    Refuse,
    /// The guest is unwound.
    Fail,
}

/// Says `verdict` at once.
#[derive(Debug, Default)]
pub struct Limiter {
    /// What it says.
    pub verdict: Verdict,
}

impl Limiter {
    fn answer(&self) -> Result<bool> {
        match self.verdict {
            Verdict::Allow => Ok(true),
            Verdict::Refuse => Ok(false),
            Verdict::Fail => Err(wasmtime::format_err!("the limiter fails")),
        }
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, _current: usize, desired: usize, maximum: Option<usize>) -> Result<bool> {
        // Whatever it says, wasmtime does not go beyond the maximum.
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(true);
        }
        self.answer()
    }

    fn table_growing(&mut self, _current: usize, _desired: usize, _maximum: Option<usize>) -> Result<bool> {
        self.answer()
    }
}

/// Naps before it says yes.
#[derive(Debug, Default)]
pub struct SlowLimiter {
    /// Where it naps.
    pub bed: Bed,
}

type Answer<'a> = Pin<Box<dyn Future<Output = Result<bool>> + Send + 'a>>;

impl ResourceLimiterAsync for SlowLimiter {
    fn memory_growing<'this, 'answer>(
        &'this mut self,
        _current: usize,
        _desired: usize,
        _maximum: Option<usize>,
    ) -> Answer<'answer>
    where
        'this: 'answer,
        Self: 'answer,
    {
        self.nap()
    }

    fn table_growing<'this, 'answer>(
        &'this mut self,
        _current: usize,
        _desired: usize,
        _maximum: Option<usize>,
    ) -> Answer<'answer>
    where
        'this: 'answer,
        Self: 'answer,
    {
        self.nap()
    }
}

impl SlowLimiter {
    fn nap(&self) -> Answer<'static> {
        let bed = self.bed.clone();
        Box::pin(async move {
            bed.nap().await;
            Ok(true)
        })
    }
}
