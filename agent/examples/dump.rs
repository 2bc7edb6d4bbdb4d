use wasmscope::{pipeline::*, span::*};
#[tokio::main]
async fn main() {
    let pid: u32 = std::env::args().nth(1).unwrap().parse().unwrap();
    let n: usize = std::env::args().nth(2).map_or(20, |s| s.parse().unwrap());
    let secs: u64 = std::env::args().nth(3).map_or(3, |s| s.parse().unwrap());
    let node = std::env::args().nth(4).is_some();
    let mut p = match Pipeline::start(Options { ring_bytes: 16 << 20, watch_all: false, detail: if node {Detail::Node} else {Detail::Boundary} }) {
        Ok(v) => v,
        Err(e) => { let mut s: Option<&dyn std::error::Error> = Some(&e); while let Some(x) = s { eprintln!("{x}"); s = x.source(); } std::process::exit(1) }
    };
    let t = std::time::Instant::now();
    let (report, _) = p.watch(pid).unwrap();
    eprintln!("{report:#?} {:?}", t.elapsed());
    let mut out = Output::default();
    while t.elapsed().as_secs() < secs { p.ready().await; let o = p.turn(); out.append(o); if !p.is_watching(pid) {break} }
    let (o, cap) = p.finish(); out.append(o);
    for e in out.events.iter().take(n) { println!("{}", serde_json::to_string(e).unwrap()); }
    println!("{cap:#?}");
    let mut c = std::collections::BTreeMap::<String, u64>::new();
    for t in &out.traces { for s in t.root.walk() {
        let k = match &s.kind { SpanKind::Invoke{function} => format!("invoke {} {}", function.as_ref().map_or("?".into(), |f| format!("{}/{}", f.module.name, f.name)), s.outcome.as_str()),
          SpanKind::HostCall{import} => format!("host {} {} {:?}", import.as_ref().map_or("?".into(), |f| format!("{}.{}", f.module, f.name)), s.outcome.as_str(), s.end_bound),
          SpanKind::Syscall{name,..} => format!("sys {name} {}", s.stack.iter().map(|f| f.name.clone()).collect::<Vec<_>>().join("<")), SpanKind::Trap{code, function,..} => format!("trap {code} {:?}", function.as_ref().map(|f| &f.name)) };
        *c.entry(k.chars().take(150).collect()).or_default() += 1; } }
    println!("{c:#?}");
    println!("suspends {}", out.traces.iter().flat_map(|t| t.root.walk()).filter(|s| matches!(s.kind, SpanKind::Invoke{..})).map(|s| s.suspends.len()).sum::<usize>());
    let tt = std::time::Instant::now(); drop(p); eprintln!("dropped {:?}", tt.elapsed());
}
