//! What the loaded programs and maps cost: descriptors of them, and what the kernel says of those.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
};

use aya::{
    Ebpf,
    sys::{Stats, enable_stats},
};

use super::{
    attach::Attacher,
    load::{Kernel, map_fds},
};

/// A program or map, kept so that the kernel can be asked about it.
#[derive(Debug)]
pub struct KernelObject {
    /// Its name in the object.
    pub name: String,
    /// Whether it is a program.
    pub is_program: bool,
    descriptor: OwnedFd,
}

/// What the kernel says of a program or map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Memory that it takes, bytes.
    pub bytes: u64,
    /// Of a program: nanoseconds that it ran while run time was being measured.
    pub run_time_ns: u64,
    /// Of a program: how often it ran meanwhile.
    pub run_count: u64,
    /// Of a map: entries that it has room for; of a ring, bytes.
    pub max_entries: u64,
}

impl KernelObject {
    /// Asks the kernel.
    pub fn info(&self) -> io::Result<ObjectInfo> {
        let path = format!("/proc/self/fdinfo/{}", self.descriptor.as_raw_fd());
        Ok(parse(&fs::read_to_string(path)?))
    }
}

fn parse(text: &str) -> ObjectInfo {
    let value = |name: &str| {
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| *key == name)
            .and_then(|(_, value)| value.trim().parse().ok())
            .unwrap_or(0)
    };
    ObjectInfo {
        bytes: value("memlock"),
        run_time_ns: value("run_time_ns"),
        run_count: value("run_cnt"),
        max_entries: value("max_entries"),
    }
}

/// While this lives, the kernel measures how long each of its programs runs.
#[derive(Debug)]
pub struct RunTime {
    _descriptor: OwnedFd,
}

impl RunTime {
    /// Begins to measure (Linux 5.8). Takes `CAP_SYS_ADMIN`.
    pub fn measure() -> io::Result<Self> {
        let descriptor = enable_stats(Stats::RunTime).map_err(|error| error.io_error)?;
        Ok(Self {
            _descriptor: descriptor,
        })
    }
}

impl Kernel {
    /// The programs and maps, for as long as anybody wants to know of them. Only the first call answers with any.
    pub fn take_objects(&mut self) -> Vec<KernelObject> {
        std::mem::take(&mut self.objects)
    }
}

pub(super) fn maps_of(ebpf: &Ebpf) -> Vec<KernelObject> {
    map_fds(ebpf)
        .filter_map(|(name, descriptor)| {
            Some(KernelObject {
                name: name.to_owned(),
                is_program: false,
                descriptor: descriptor.try_clone_to_owned().ok()?,
            })
        })
        .collect()
}

pub(super) fn programs_of(kernel: &Kernel) -> Vec<KernelObject> {
    let object = |name: &str, descriptor: OwnedFd| KernelObject {
        name: name.to_owned(),
        is_program: true,
        descriptor,
    };
    let mut objects: Vec<_> = kernel
        .ebpf
        .programs()
        .filter_map(|(name, program)| {
            let descriptor = program.fd().ok()?;
            Some(object(name, descriptor.as_fd().try_clone_to_owned().ok()?))
        })
        .collect();
    if let Attacher::Multi(programs) = &kernel.attacher {
        objects.extend(programs.iter().filter_map(|(program, loaded)| {
            Some(object(program.name(), loaded.descriptor().try_clone_to_owned().ok()?))
        }));
    }
    objects
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_of_a_program_is_read() {
        let text = "pos:\t0\nprog_type:\t17\nmemlock:\t4096\nprog_id:\t52\nrun_time_ns:\t1200\nrun_cnt:\t7\n";
        let info = parse(text);
        assert_eq!((info.bytes, info.run_time_ns, info.run_count), (4096, 1200, 7));
    }
}
