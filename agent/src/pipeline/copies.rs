//! The copies of the runtime in one process, as the programs are told of them: where threads keep the activations of each,
//! and how those are laid out.

use wasmscope_common::{
    LAYOUT_ALIKE, LAYOUT_UNSUPPORTED, MAX_COPIES, ProcessConfig, RuntimeCopy, TLS_DYNAMIC, TLS_SEARCH, TLS_UNKNOWN,
};

use super::SharedHost;
use crate::{
    event::Coverage,
    image::store_layout::StoreLayout,
    process::{guests::Guests, memory::ProcessMemory},
};

/// Numbers of thread-local blocks that are believed; a process has one for each library with thread-local variables.
const MAX_TLS_NUMBER: u32 = 1 << 16;

/// Writes the layouts of a process's guests into its config. What the programs have guessed before anybody had looked at
/// the guests is taken back if it is none of them.
pub(super) fn apply_layouts(config: &mut ProcessConfig, guests: &Guests) {
    let layouts = guests.store_layouts();
    config.layouts = [0; MAX_COPIES];
    for (place, layout) in config.layouts.iter_mut().zip(&layouts) {
        let is_alike = |other: &&StoreLayout| other.base == layout.base && *other != layout;
        let alike = if layouts.iter().any(|other| is_alike(&other)) {
            LAYOUT_ALIKE
        } else {
            0
        };
        *place = layout.encode() | alike;
    }
    if layouts.is_empty() && !guests.layout_errors().is_empty() {
        config.layouts[0] = LAYOUT_UNSUPPORTED;
    }
    if config.layouts[0] == 0 {
        return;
    }
    for copy in &mut config.copies {
        let is_one = |layout: &u32| layout & !LAYOUT_ALIKE == copy.layout & !LAYOUT_ALIKE;
        if !config.layouts.iter().any(is_one) {
            copy.layout = 0;
            copy.store_offset = 0;
        }
    }
}

/// Gives each file a copy in the config; what the programs have found out of it is kept.
pub(super) fn apply_hosts(config: &mut ProcessConfig, hosts: &[SharedHost]) {
    let hosts = &hosts[..hosts.len().min(MAX_COPIES)];
    if hosts.len() > 1 && config.copies[0].file == 0 {
        // What was found before the files were known may be of any of them.
        config.copies[0] = RuntimeCopy::default();
    }
    for (copy, host) in config.copies.iter_mut().zip(hosts) {
        // Files keep their order, so each one's place is the same as before.
        copy.file = host.number;
        if copy.store_offset == 0 && matches!(copy.tls_kind, TLS_UNKNOWN | TLS_SEARCH) {
            host.plan.tls.apply(copy);
        }
    }
    config.task_offset = hosts.iter().find_map(|host| host.plan.task_offset).unwrap_or(0);
    config.other_copies = hosts.len().saturating_sub(1) as u32;
}

/// Names the thread-local block of each library that has one by now, as the loader says. Else the programs would have to look for it on
/// threads, where the blocks of other libraries may resemble it.
pub(super) fn apply_tls_numbers(config: &mut ProcessConfig, places: &[Option<u64>], memory: &ProcessMemory) {
    for (copy, place) in config.copies.iter_mut().zip(places) {
        let Some(place) = place.filter(|_| copy.tls_kind == TLS_DYNAMIC && copy.tls_module == 0) else {
            continue;
        };
        // Not there yet: 0. A process that is gone needs none.
        let number = memory.read_array(place).map_or(0, u64::from_le_bytes);
        copy.tls_module = u32::try_from(number)
            .ok()
            .filter(|number| *number <= MAX_TLS_NUMBER)
            .unwrap_or(0);
    }
}

/// What is observed in all copies.
pub(super) fn common_coverage(one: Coverage, other: Coverage) -> Coverage {
    Coverage {
        activations: one.activations && other.activations,
        host_calls: one.host_calls && other.host_calls,
        host_call_ends: one.host_call_ends && other.host_call_ends,
        unwinds: one.unwinds && other.unwinds,
    }
}

/// What is not observed, that of each host and of all together, in words for a person.
pub(super) fn limits(
    hosts: &[SharedHost],
    guests: &Guests,
    limits_of: impl Fn(&SharedHost) -> Vec<String>,
) -> Vec<String> {
    let mut limits: Vec<String> = Vec::new();
    for limit in hosts.iter().flat_map(limits_of) {
        if !limits.contains(&limit) {
            limits.push(limit);
        }
    }
    if hosts.is_empty() {
        limits.push("no host binary recognised: only what makes syscalls is seen".to_owned());
    }
    if hosts.len() > MAX_COPIES {
        limits.push(format!(
            "{} copies of the runtime in the process: only {MAX_COPIES} of them are followed",
            hosts.len()
        ));
    }
    limits.extend(
        guests
            .layout_errors()
            .iter()
            .map(|error| format!("{error}: guests that it runs are not followed")),
    );
    limits.extend(guests.limits());
    limits
}
