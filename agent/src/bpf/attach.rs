//! Uprobes at sites of one file: through one `uprobe.multi` link where the kernel has it, else through one perf event a
//! site.

use std::{
    fs::File,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::programs::{
    ProgramError, UProbe,
    uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeLinkId, UProbeScope},
};

use super::{
    load::Kernel,
    multi::{MultiError, MultiLink, MultiProgram, MultiSite},
};

/// Programs that are attached to sites. None is, or ever may be, a return probe: those rewrite return addresses on
/// stacks, which kills processes that switch stacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SiteProgram {
    /// On the function that swaps the activation record.
    ActivationSwap,
    /// On the function through which traps and host errors leave.
    Unwind,
    /// On entry of a host function.
    HostCall,
    /// On entry of a host function that a component calls.
    ComponentHostCall,
    /// On a `ret` of a host function.
    HostCallEnd,
    /// On entry of a function that is called seldom; the site's kind tells what it is.
    Mark,
    /// On a `ret` of such a function.
    MarkEnd,
    /// Where work is handed to helper threads, where they begin it and where it is done.
    Helper,
}

impl SiteProgram {
    /// Every program, ends before begins: attached in this order, no begin is seen whose end cannot be.
    pub const ALL: [Self; 8] = [
        Self::HostCallEnd,
        Self::MarkEnd,
        Self::ActivationSwap,
        Self::Unwind,
        Self::HostCall,
        Self::ComponentHostCall,
        Self::Mark,
        Self::Helper,
    ];

    /// Its name in the object.
    pub fn name(self) -> &'static str {
        match self {
            Self::ActivationSwap => "activation_swap",
            Self::Unwind => "unwind",
            Self::HostCall => "host_call",
            Self::ComponentHostCall => "component_host_call",
            Self::HostCallEnd => "host_call_end",
            Self::Mark => "mark",
            Self::MarkEnd => "mark_end",
            Self::Helper => "helper",
        }
    }
}

/// One site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UprobeSite {
    /// Bytes from the start of the file to the instruction.
    pub file_offset: u64,
    /// A [`wasmscope_common::SiteCookie`].
    pub cookie: u64,
}

/// Live attachments of one program in one file; dropping it detaches them. With perf events that takes about 0.1 s a
/// site, so drop it where nobody waits.
pub struct SiteLinks {
    multi: Option<MultiLink>,
    /// What it takes to attach them again.
    path: PathBuf,
    sites: Vec<MultiSite>,
    /// Set while they are detached: the file they belong to, under whatever path.
    paused: Option<File>,
    /// Perf-event links, to be given back to the program that owns them.
    perf: Vec<(SiteProgram, UProbeLinkId)>,
}

/// Why sites could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Through a multi link.
    #[error("cannot attach {count} sites in {path}")]
    Multi {
        /// Sites asked for.
        count: usize,
        /// File asked for.
        path: PathBuf,
        /// What happened.
        #[source]
        source: MultiError,
    },
    /// Through perf events.
    #[error("cannot attach a site in {path}")]
    Perf {
        /// File asked for.
        path: PathBuf,
        /// What happened.
        #[source]
        source: ProgramError,
    },
}

/// The site programs, loaded one way or the other.
pub(super) enum Attacher {
    Multi(Vec<(SiteProgram, MultiProgram)>),
    Perf,
}

impl Kernel {
    /// Attaches `program` at `sites` of the file at `path`, in every process that maps it; the program itself ignores
    /// processes that are not watched.
    pub fn attach_sites(
        &mut self,
        path: &Path,
        program: SiteProgram,
        sites: &[UprobeSite],
    ) -> Result<SiteLinks, AttachError> {
        match &self.attacher {
            Attacher::Multi(programs) => {
                let sites: Vec<_> = sites
                    .iter()
                    .map(|site| MultiSite {
                        file_offset: site.file_offset,
                        cookie: site.cookie,
                    })
                    .collect();
                let (_, loaded) = programs
                    .iter()
                    .find(|(loaded, _)| *loaded == program)
                    .expect("every site program was loaded");
                let link = loaded.attach(path, &sites).map_err(|source| AttachError::Multi {
                    count: sites.len(),
                    path: path.to_owned(),
                    source,
                })?;
                Ok(SiteLinks {
                    multi: Some(link),
                    path: path.to_owned(),
                    sites,
                    paused: None,
                    perf: Vec::new(),
                })
            }
            Attacher::Perf => self.attach_perf(path, program, sites),
        }
    }

    fn attach_perf(
        &mut self,
        path: &Path,
        program: SiteProgram,
        sites: &[UprobeSite],
    ) -> Result<SiteLinks, AttachError> {
        let failed = |source| AttachError::Perf {
            path: path.to_owned(),
            source,
        };
        let loaded: &mut UProbe = self
            .ebpf
            .program_mut(program.name())
            .expect("every site program was loaded")
            .try_into()
            .map_err(failed)?;
        let mut links = SiteLinks {
            multi: None,
            path: path.to_owned(),
            sites: Vec::new(),
            paused: None,
            perf: Vec::with_capacity(sites.len()),
        };
        for site in sites {
            let point = UProbeAttachPoint {
                location: UProbeAttachLocation::AbsoluteOffset(site.file_offset),
                cookie: Some(site.cookie),
            };
            match loaded.attach(point, path, UProbeScope::AllProcesses) {
                Ok(link) => links.perf.push((program, link)),
                Err(source) => {
                    // All or nothing: a site that fires while its program counts as missing would contradict it.
                    self.detach(links);
                    return Err(failed(source));
                }
            }
        }
        Ok(links)
    }

    /// Detaches for a while, elsewhere, as that waits. Perf events stay, as attaching and detaching them takes too long, and so
    /// do sites of a file that could not be found again.
    pub fn pause_links(&self, links: &mut SiteLinks) {
        if links.multi.is_none() {
            return;
        }
        let Ok(file) = File::open(&links.path) else { return };
        links.paused = Some(file);
        let link = links.multi.take();
        std::thread::spawn(move || drop(link));
    }

    /// Attaches again what [`Self::pause_links`] has detached. `false` if that failed.
    pub fn resume_links(&self, program: SiteProgram, links: &mut SiteLinks) -> bool {
        let (Some(file), Attacher::Multi(programs)) = (&links.paused, &self.attacher) else {
            return true;
        };
        let Some((_, loaded)) = programs.iter().find(|(loaded, _)| *loaded == program) else {
            return false;
        };
        match loaded.attach_file(file.as_fd(), &links.sites) {
            Ok(link) => {
                links.multi = Some(link);
                links.paused = None;
                true
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "sites not attached again");
                false
            }
        }
    }

    /// Detaches for good, a perf event at a time, as each makes its caller wait; the rest elsewhere. `true` when nothing is left.
    pub fn detach_part(&mut self, links: &mut SiteLinks) -> bool {
        if let Some(link) = links.multi.take() {
            std::thread::spawn(move || drop(link));
        }
        if let Some((program, link)) = links.perf.pop()
            && let Some(Ok(loaded)) = self.ebpf.program_mut(program.name()).map(<&mut UProbe>::try_from)
        {
            // A link that cannot be found is already gone.
            let _ = loaded.detach(link);
        }
        links.perf.is_empty()
    }

    /// Detaches at once instead of when the programs are unloaded.
    pub fn detach(&mut self, links: SiteLinks) {
        for (program, link) in links.perf {
            if let Some(Ok(loaded)) = self.ebpf.program_mut(program.name()).map(<&mut UProbe>::try_from) {
                // A link that cannot be found is already gone.
                let _ = loaded.detach(link);
            }
        }
    }
}
