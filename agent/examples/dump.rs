use wasmscope::{
    bpf::*,
    decode::decode,
    process::{maps, memory::ProcessMemory},
};
use wasmscope_common::*;
#[tokio::main]
async fn main() {
    let pid: u32 = std::env::args().nth(1).unwrap().parse().unwrap();
    let n: usize = std::env::args().nth(2).map_or(20, |s| s.parse().unwrap());
    let (mut k, mut ring) = match Kernel::load(LoadOptions {
        ring_bytes: 16 << 20,
        watch_new_wasm: false,
        new_process_flags: 0,
    }) {
        Ok(v) => v,
        Err(e) => {
            let mut s: Option<&dyn std::error::Error> = Some(&e);
            while let Some(x) = s {
                eprintln!("{x}");
                s = x.source();
            }
            std::process::exit(1)
        }
    };
    let m = maps::executable_mappings(pid).unwrap();
    let mem = ProcessMemory::open(pid).unwrap();
    let codes = maps::code_objects(&m, &mem);
    eprintln!("code: {codes:#x?}");
    let lo = codes.iter().map(|c| c.range.start).min().unwrap_or(0);
    let hi = codes.iter().map(|c| c.range.end).max().unwrap_or(0);
    k.watch(
        pid,
        ProcessConfig {
            flags: 7,
            generation: 1,
            code_start: lo,
            code_end: hi,
            ..Default::default()
        },
    )
    .unwrap();
    eprintln!("watching");
    let mut seen = 0;
    let t = std::time::Instant::now();
    while t.elapsed().as_secs() < 3 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        seen += ring.drain(1_000_000, |b| {
            if seen < n {
                println!("{:x?}", decode(b));
            }
        });
    }
    eprintln!("{seen} records, config {:x?}", k.config(pid));
    for (c, v) in k.counters().iter() {
        eprintln!("{} {v}", c.name());
    }
}
