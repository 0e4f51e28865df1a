"""Checkpoints load as their authors published them, or say why they don't."""

import pickle

import parity_rule as rule
import pytest
import safetensors.torch
import timm
import torch

import zoo
from zoo.backbones import catalogue
from zoo.backbones.checkpoints import unwrap


class Arbitrary:
    """Something that a pickle would execute."""


@pytest.fixture(scope='module')
def official():
    return {k: v.float() for k, v in rule.checkpoint(rule.load_record('van__van_b0')).items()}


def logits(model):
    return model.eval()(rule.image(64).float())


@pytest.mark.parametrize('wrapper', [None, 'model', 'state_dict'])
@pytest.mark.parametrize('suffix', ['.pth', '.pth.tar'])
def test_official_files_load_with_and_without_wrapper(official, tmp_path, wrapper, suffix):
    path = tmp_path / f'weights{suffix}'
    torch.save({wrapper: official, 'epoch': 300} if wrapper else official, path)
    by_zoo = zoo.create_model('van_b0', checkpoint=path)
    by_timm = timm.create_model('van_b0', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert torch.equal(logits(by_zoo), logits(by_timm))


def test_averaged_weights_are_taken_where_the_authors_publish_these():
    both = {'model': {'a': torch.zeros(1)}, 'model_ema': {'a': torch.ones(1)}}
    assert unwrap(both, 'glnet_16g.in1k') == both['model_ema']
    assert unwrap(both, 'glnet_9g') == unwrap(both) == both['model']
    assert unwrap({'module.a': 0, 'module.b.module.c': 1}) == {'a': 0, 'b.module.c': 1}


def test_safetensors_load(official, tmp_path):
    safetensors.torch.save_file(official, tmp_path / 'weights.safetensors')
    model = zoo.create_model('van_b0', checkpoint=tmp_path / 'weights.safetensors')
    assert torch.equal(model.head.fc.weight, official['head.weight'])


def test_a_saved_model_loads_again_with_its_own_number_of_classes(tmp_path):
    model = timm.create_model('van_b0', num_classes=7)
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    again = zoo.create_model('van_b0', checkpoint=tmp_path / 'own.pth', num_classes=7)
    assert torch.equal(logits(again), logits(model))


def test_another_number_of_classes_gets_a_new_classifier_on_the_same_trunk(official, tmp_path):
    torch.save(official, tmp_path / 'w.pth')
    model = zoo.create_model('van_b0', checkpoint=tmp_path / 'w.pth', num_classes=5)
    whole = zoo.create_model('van_b0', checkpoint=tmp_path / 'w.pth')
    x = rule.image(64).float()
    assert logits(model).shape == (1, 5)
    assert torch.equal(model.eval().forward_features(x), whole.eval().forward_features(x))


def test_features_only_has_the_checkpoints_weights(official, tmp_path):
    torch.save(official, tmp_path / 'w.pth')
    x = rule.image(64).float()
    maps = zoo.create_model('van_b0', checkpoint=tmp_path / 'w.pth', features_only=True, out_indices=(1, 3)).eval()(x)
    whole = zoo.create_model('van_b0', checkpoint=tmp_path / 'w.pth').eval()
    for got, want in zip(maps, whole.forward_intermediates(x, indices=(1, 3), intermediates_only=True), strict=True):
        torch.testing.assert_close(got, want)


def test_one_channel_sums_the_first_convolution(official, tmp_path):
    torch.save(official, tmp_path / 'w.pth')
    model = zoo.create_model('van_b0', checkpoint=tmp_path / 'w.pth', in_chans=1)
    weight = model.get_submodule(model.first_conv).weight
    torch.testing.assert_close(weight, official['patch_embed1.proj.weight'].sum(1, keepdim=True))


def test_a_model_of_timm_loads_the_same_way(tmp_path):
    model = timm.create_model('resnet18', num_classes=3)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'r.pth')
    again = zoo.create_model('resnet18', checkpoint=tmp_path / 'r.pth', num_classes=3)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(zoo.CheckpointError, match='does not fit resnet34'):
        zoo.create_model('resnet34', checkpoint=tmp_path / 'r.pth', num_classes=3)


def test_missing_unexpected_and_misshaped_keys_are_counted_and_listed(official, tmp_path):
    broken = dict(official)
    for key in [k for k in broken if k.startswith('block4.')]:
        del broken[key]
    broken['block9.0.extra'] = torch.zeros(1)
    broken['norm1.weight'] = torch.zeros(5)
    torch.save(broken, tmp_path / 'broken.pth')
    gone = [k for k in official if k.startswith('block4.') and 'num_batches_tracked' not in k]
    for classes in (1000, 10):  # timm loads without checking when the number of classes differs
        with pytest.raises(zoo.CheckpointError) as error:
            zoo.create_model('van_b0', checkpoint=tmp_path / 'broken.pth', num_classes=classes)
        message = str(error.value)
        assert f'{len(gone)} missing (' in message
        assert message.count('stages.3.blocks.') == 10  # the first ten of them
        assert '1 unexpected (stages.8.blocks.0.extra)' in message
        assert '1 misshaped (stages.0.norm.weight (5,) instead of (32,))' in message


def test_a_foreign_checkpoint_is_told_what_it_looks_like(official, tmp_path):
    torch.save({'state_dict': official}, tmp_path / 'van.pth')
    with pytest.raises(zoo.CheckpointError, match=r"does not fit nat_mini: .*It looks like VAN: try 'van_b0'"):
        zoo.create_model('nat_mini', checkpoint=tmp_path / 'van.pth')


def test_the_two_layouts_of_biformer_are_told_apart(tmp_path):
    torch.save(rule.checkpoint(rule.load_record('biformer__biformer_stl')), tmp_path / 'stl.pth')
    with pytest.raises(zoo.CheckpointError, match="try 'biformer_stl'"):
        zoo.create_model('biformer_stl_nchw', checkpoint=tmp_path / 'stl.pth')


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    (tmp_path / 'evil.pth').write_bytes(pickle.dumps(Arbitrary()))
    torch.save({'model': Arbitrary()}, tmp_path / 'evil2.pth')
    for name in ('evil.pth', 'evil2.pth'):
        with pytest.raises(zoo.CheckpointError, match='not a readable checkpoint'):
            zoo.create_model('van_b0', checkpoint=tmp_path / name)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('content', [b'', b'not weights', b'PK\x03\x04' + b'\0' * 64])
def test_a_corrupt_file_is_named(tmp_path, suffix, content):
    path = tmp_path / f'corrupt.{suffix}'
    path.write_bytes(content)
    with pytest.raises(zoo.CheckpointError, match='corrupt'):
        zoo.create_model('van_b0', checkpoint=path)


def test_a_truncated_file_is_named(official, tmp_path):
    torch.save(official, tmp_path / 'whole.pth')
    (tmp_path / 'half.pth').write_bytes((tmp_path / 'whole.pth').read_bytes()[:100_000])
    with pytest.raises(zoo.CheckpointError, match='half'):
        zoo.create_model('van_b0', checkpoint=tmp_path / 'half.pth')


def test_a_file_without_weights_is_named(tmp_path):
    torch.save({'epoch': 3}, tmp_path / 'nothing.pth')
    with pytest.raises(zoo.CheckpointError, match='no state dict'):
        zoo.create_model('van_b0', checkpoint=tmp_path / 'nothing.pth')
    with pytest.raises(FileNotFoundError, match=r'absent\.pth'):
        zoo.create_model('van_b0', checkpoint=tmp_path / 'absent.pth')


def test_pretrained_without_a_direct_link_says_where_the_file_is():
    with pytest.raises(RuntimeError, match=r"onedrive.*zoo\.create_model\('biformer_tiny', checkpoint=PATH\)"):
        timm.create_model('biformer_tiny', pretrained=True)
    with pytest.raises(RuntimeError, match='published none'):
        timm.create_model('van_b6', pretrained=True)


def test_direct_links_are_what_timm_downloads():
    for name in zoo.list_models(pretrained=True):
        cfg, weights = timm.get_pretrained_cfg(name), catalogue.info(name)['weights'][0]
        if 'url' in weights:
            assert cfg.url == weights['url']
            assert cfg.url.startswith('https://')
        else:
            assert cfg.hf_hub_id == weights['hf_hub_id']
