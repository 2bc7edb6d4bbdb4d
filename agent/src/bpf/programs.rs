//! Loads the programs of the object, each on a thread of its own: the verifier takes a second for each of the larger ones, and this is how
//! long an agent is blind when it is replaced.

use std::{os::fd::AsFd as _, thread};

use aya::{
    Ebpf,
    programs::{Program, ProgramError},
};

use super::{
    attach::{Attacher, SiteProgram},
    load::{LoadError, TRACEPOINTS, map_fds, missing, multi_error, program_error},
    multi::{self, MultiError, MultiProgram},
};

/// Loads those on tracepoints and those at sites.
pub(super) fn load(object: &[u8], ebpf: &mut Ebpf) -> Result<Attacher, LoadError> {
    let has_multi = match multi::supported() {
        Ok(()) => true,
        Err(MultiError::Unsupported) => false,
        Err(error) => return Err(multi_error(error)),
    };
    let mut maps = Vec::new();
    for (name, descriptor) in map_fds(ebpf) {
        let descriptor = descriptor.try_clone_to_owned().map_err(LoadError::Descriptors)?;
        maps.push((name.to_owned(), descriptor));
    }
    let maps = &maps;
    let mut wanted: Vec<&'static str> = TRACEPOINTS.map(|(name, _)| name).to_vec();
    if !has_multi {
        wanted.extend(SiteProgram::ALL.map(SiteProgram::name));
    }
    thread::scope(|scope| {
        let multi = has_multi.then(|| {
            SiteProgram::ALL.map(|program| {
                let load = move || {
                    let maps = maps
                        .iter()
                        .map(|(name, descriptor)| (name.as_str(), descriptor.as_fd()));
                    MultiProgram::load(object, program.name(), maps)
                };
                (program, scope.spawn(load))
            })
        });
        let mut own = Vec::new();
        for (name, program) in ebpf.programs_mut() {
            // What is left is what there is none of.
            if let Some(index) = wanted.iter().position(|wanted| *wanted == name) {
                own.push((wanted.swap_remove(index), scope.spawn(|| load_own(program))));
            }
        }
        if let Some(name) = wanted.first() {
            return Err(missing(name));
        }
        for (name, loading) in own {
            joined(loading).map_err(|source| program_error(name, source))?;
        }
        let Some(multi) = multi else {
            return Ok(Attacher::Perf);
        };
        let mut loaded = Vec::with_capacity(multi.len());
        for (program, loading) in multi {
            loaded.push((program, joined(loading).map_err(multi_error)?));
        }
        Ok(Attacher::Multi(loaded))
    })
}

fn load_own(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::RawTracePoint(program) => program.load(),
        Program::UProbe(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
