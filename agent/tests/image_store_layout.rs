//! Where real code objects (see `fixtures/images/README.md`) say that activations are kept.

use std::{fs, path::PathBuf};

use object::{Object as _, ObjectSection as _};
use wasmscope::image::{
    CodeObject,
    store_layout::{LayoutError, Shape, StoreLayout},
};

const LAYOUTS: [(&str, StoreLayout); 7] = [
    ("24", layout_of(0x18, Shape::GuestExitEntrySp, false)),
    ("36", layout_of(0x28, Shape::GuestExit, true)),
    ("38", layout_of(0x28, Shape::WithHandler, true)),
    ("42", layout_of(0x28, Shape::WithHandler, true)),
    ("43", layout_of(0x30, Shape::WithHandler, true)),
    ("48", layout_of(0x30, Shape::WithHandler, true)),
    ("50", layout_of(0x30, Shape::WithHandler, true)),
];

const fn layout_of(base: u16, shape: Shape, has_result: bool) -> StoreLayout {
    StoreLayout {
        base,
        shape,
        has_result,
    }
}

fn bytes(name: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images");
    fs::read(folder.join(format!("{name}.cwasm"))).expect("the fixture is committed")
}

/// The same image, said to be made by another version.
fn as_version(image: &[u8], from: &str, to: &str) -> Vec<u8> {
    assert_eq!((from.len(), to.len()), (2, 2));
    let mut image = image.to_vec();
    // Format and length of the version precede it, as on wasmtime's disk format.
    let from = [&[0, u8::try_from(from.len()).expect("short")], from.as_bytes()].concat();
    let position = memchr::memmem::find(&image, &from).expect("the version is in the image");
    image[position + 2..position + 4].copy_from_slice(to.as_bytes());
    assert_eq!(CodeObject::read(&image).expect("an image").engine_version(), to);
    image
}

fn layout(image: &[u8]) -> Result<StoreLayout, LayoutError> {
    let object = CodeObject::read(image).expect("wasmtime wrote it");
    object.store_layout().map_err(Clone::clone)
}

#[test]
fn every_version_keeps_its_activations_where_the_table_says() {
    for (version, known) in LAYOUTS {
        for image in ["host_calls", "nameless", "traps"] {
            let object = CodeObject::read(&bytes(&format!("{version}/{image}"))).expect("wasmtime wrote it");
            assert_eq!(
                object.engine_major().map(|major| major.to_string()).as_deref(),
                Some(version)
            );
            let found = object.store_layout().map_err(Clone::clone);
            assert_eq!(found, Ok(known), "{version}/{image}");
        }
    }
    let of_48 = layout_of(0x30, Shape::WithHandler, true);
    assert_eq!(layout(&bytes("48/component")), Ok(of_48));
    assert_eq!(layout(&bytes("48/host_calls_no_symbols")), Ok(of_48));
}

#[test]
fn the_trampolines_of_a_version_that_is_not_known_tell_as_much() {
    for (version, known) in LAYOUTS {
        let image = bytes(&format!("{version}/host_calls"));
        let full = CodeObject::read(&image).expect("an image").engine_version().to_owned();
        if full.len() != 2 {
            continue;
        }
        let unknown = as_version(&image, version, "99");
        assert_eq!(layout(&unknown), Ok(known), "{version}");
    }
}

#[test]
fn what_cannot_be_derived_is_not_guessed() {
    let mut image = as_version(&bytes("48/traps"), "48", "99");
    let text = object::File::parse(image.as_slice())
        .expect("ELF")
        .section_by_name(".text")
        .and_then(|text| text.file_range())
        .expect("there is code");
    let text = usize::try_from(text.0).expect("it fits")..usize::try_from(text.0 + text.1).expect("it fits");
    image[text].fill(0x90);
    assert_eq!(layout(&image), Err(LayoutError::UnknownVersion("99".to_owned())));
}

#[test]
fn an_image_that_contradicts_its_version_is_refused() {
    for other in ["36", "42"] {
        let image = as_version(&bytes("48/host_calls"), "48", other);
        assert_eq!(layout(&image), Err(LayoutError::Contradiction(other.to_owned())));
    }
}
